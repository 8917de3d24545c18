"""Which part of what is held a token reads. One retriever per file; :data:`REGISTRY` names them."""

from kvlocal.retrieval.registry import REGISTRY, UNITS, make_retriever
from kvlocal.retrieval.retriever import Retriever

__all__ = ["REGISTRY", "UNITS", "Retriever", "make_retriever"]
