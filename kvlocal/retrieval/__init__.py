"""Which part of what is held a token reads. One retriever per file; :data:`REGISTRY` names them."""

from kvlocal.retrieval.registry import REGISTRY, make_retriever
from kvlocal.retrieval.retriever import Retriever

__all__ = ["REGISTRY", "Retriever", "make_retriever"]
