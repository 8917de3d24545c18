"""Every architecture of the pinned llama.cpp: its kind of memory, models that people know, and metadata of a tiny one.

The page docs/reference/architectures.md is written from this table, tests/native/model/test_architectures.py holds it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

GROUPS = {
    "plain": "attention over everything",
    "m-rope": "attention over everything, positions in several dimensions (text only)",
    "window": "sliding windows beside open layers",
    "window + sinks": "sliding windows and attention sinks",
    "window + shared": "sliding windows, and layers that read the cache of others",
    "chunked": "windows that begin at multiples of a length",
    "hybrid": "recurrent layers beside attention",
    "mla": "multi-head latent attention",
    "hybrid + mla": "recurrent layers beside latent attention",
    "alibi": "position biases (ALiBi), or logits scaled outside attention",
    "sparse": "an indexer chooses the tokens, in a cache of its own",
    "recurrent": "recurrent: nothing grows",
    "other": "no decoder of text with a cache: encoders, diffusion, drafts, audio, images",
}
"""Kinds of memory, in words."""

SERVED = ("plain", "m-rope", "window", "window + sinks", "window + shared", "chunked", "hybrid", "mla", "hybrid + mla")
"""Groups that the paged cache serves."""


@dataclass(frozen=True)
class Arch:
    """An architecture, or a variant of it.

    Attributes:
        name: as GGUF files have it; group: of :data:`GROUPS`.
        known: models that people know by name.
        metadata: what a tiny model needs beside :func:`common_metadata`, without the name before it; ``None`` leaves a
            key out.
        variant: what is special about it.
        made: a tiny model can be made; else the reason stands in ``why_not``.
        bound: largest normalized squared error of the paged logits against llama.cpp's own cache in f32.
    """

    name: str
    group: str
    known: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    why_not: str = ""
    bound: float = 1e-6

    @property
    def made(self) -> bool:
        return not self.why_not

    @property
    def served(self) -> bool:
        return self.group in SERVED

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


def _all(group: str, names: str, **kwargs: Any) -> list[Arch]:
    return [Arch(name, group, **kwargs) for name in names.split()]


_GATED = {"ssm.inner_size": 128, "attention.key_length": 32, "attention.value_length": 32}
_EVERY_OTHER = {"attention.head_count_kv": [0, 2, 0, 2]}
_NEMOTRON = _EVERY_OTHER | {"feed_forward_length": [0, 0, 192, 0]}
_PATTERN = {"attention.sliding_window_pattern": [True, False, True, False]}
_LATENT = {
    "attention.head_count_kv": 1,
    "attention.key_length": 192,
    "attention.value_length": 128,
    "attention.key_length_mla": 96,
    "attention.value_length_mla": 64,
    "attention.kv_lora_rank": 128,
    "rope.dimension_count": 64,
}
_LATENT_HYBRID = _LATENT | {"attention.head_count_kv": [0, 1, 0, 1]}
_ALL_HEADS = {"attention.head_count_kv": 4}
_SPLIT = _ALL_HEADS | {"attention.key_length": 96, "attention.value_length": 32, "rope.dimension_count": 32}

TABLE: list[Arch] = [
    Arch("llama", "plain", "Llama 2 and 3, Mistral 7B, SmolLM2, TinyLlama"),
    Arch("qwen2", "plain", "Qwen2.5, DeepSeek-R1-Distill-Qwen"),
    Arch("qwen3", "plain", "Qwen3"),
    Arch("qwen3moe", "plain", "Qwen3-30B-A3B, Qwen3-Coder"),
    Arch("mistral3", "plain", "Ministral 3, Mistral Small 3"),
    Arch("phi3", "plain", "Phi-3, Phi-4, Phi-4-mini"),
    Arch("granite", "plain", "Granite 3, Granite 4.1"),
    Arch("smollm3", "plain", "SmolLM3"),
    Arch("gemma", "plain", "Gemma 1"),
    Arch("seed_oss", "plain", "Seed-OSS-36B"),
    *_all(
        "plain",
        "deci falcon gpt2 gptneox baichuan starcoder starcoder2 stablelm qwen qwen2moe phi2 phimoe plamo codeshell"
        " orion internlm2 minicpm xverse command-r dbrx olmo openelm arctic deepseek chatglm jais2 nemotron exaone"
        " granitemoe bailingmoe arcee ernie4_5 ernie4_5-moe hunyuan-moe hunyuan-dense grovemoe minimax-m2"
        " pangu-embedded maincoder nanbeige talkie",
    ),
    *_all("plain", "glm4 bitnet", bound=1e-5),
    Arch("cogvlm", "plain", bound=1e-5),
    Arch("exaone4", "plain", "EXAONE 4 1.2B"),
    Arch("apertus", "plain", "Apertus", {"xielu.alpha_n": [1.0] * 4, "xielu.alpha_p": [1.0] * 4,
                                         "xielu.beta": [1.0] * 4, "xielu.eps": [1e-7] * 4}),
    *_all("plain", "olmoe", metadata=_ALL_HEADS),
    Arch("dots1", "plain", "dots.llm1", _ALL_HEADS | {"attention.key_length": 32, "attention.value_length": 32}),
    Arch("deepseek2-ocr", "plain", "DeepSeek-OCR", _ALL_HEADS | {f"attention.{k}_length": 32 for k in ("key", "value")}
         | {"rope.dimension_count": 32}),
    *_all("plain", "minicpm3 plm", metadata=_SPLIT),
    Arch("hrm_text", "plain", metadata={"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2,
                                         "hrm.l_cycles": 2}),
    Arch("olmo2", "plain", "OLMo 2", {"attention.sliding_window": None}, "no-window", bound=1e-5),
    Arch("gemma3", "plain", metadata={"attention.sliding_window": None}, variant="no-window"),
    Arch("glm4moe", "plain", "GLM-4.5-Air", {"block_count": 5, "nextn_predict_layers": 1}, "mtp"),
    Arch("bailingmoe2", "plain", "Ling-mini 2"),
    Arch("hy_v3", "plain", "Hunyuan 3"),
    Arch("qwen3vl", "m-rope", "Qwen3-VL (text)"),
    Arch("qwen3vlmoe", "m-rope", "Qwen3-VL-30B-A3B (text)"),
    Arch("qwen2vl", "m-rope", "Qwen2.5-VL (text)"),
    *_all("m-rope", "hunyuan_vl paddleocr"),
    Arch("gemma2", "window", "Gemma 2"),
    Arch("gemma3", "window", "Gemma 3", {"block_count": 6}),
    Arch("olmo2", "window", "Olmo 3", variant="window", bound=1e-5),
    Arch("cohere2", "window", "Command R7B, Command A"),
    Arch("exaone-moe", "window", "K-EXAONE"),
    Arch("smallthinker", "window", "SmallThinker"),
    *_all("window", "cohere2moe muse-glimmer afmoe laguna mellum"),
    Arch("plamo3", "window", "PLaMo 3", {"attention.sliding_window_pattern": 2}),
    Arch("step35", "window", "Step 3.5 Flash", _PATTERN),
    Arch("maple", "window", metadata=_PATTERN | {"swiglu_clamp_exp": 7.0}),
    Arch("spark2_5", "window", metadata=_PATTERN),
    Arch("gpt-oss", "window + sinks", "gpt-oss-20b, gpt-oss-120b"),
    Arch("granite_swa", "window + sinks", "Granite SWA", _PATTERN),
    Arch("mimo2", "window + sinks", "MiMo-V2-Flash", _PATTERN, bound=1e-5),
    Arch("gemma4", "window + shared", "Gemma 4 E2B, E4B", {
        "block_count": 10, "attention.key_length": 64, "attention.value_length": 64, "attention.key_length_swa": 32,
        "attention.value_length_swa": 32, "attention.sliding_window_pattern": [True, True, True, True, False] * 2,
        "rope.dimension_count": 64, "rope.dimension_count_swa": 32, "attention.shared_kv_layers": 5,
        "embedding_length_per_layer_input": 16, "rope.freq_base_swa": 10000.0, "expert_count": None,
        "expert_used_count": None,
    }, bound=1e-5),
    Arch("gemma4", "window", "Gemma 4 12B, 26B-A4B, 31B", {
        "block_count": 5, "attention.key_length": 64, "attention.value_length": 64, "attention.key_length_swa": 32,
        "attention.value_length_swa": 32, "attention.sliding_window_pattern": [True, True, True, True, False],
        "rope.dimension_count": 64, "rope.dimension_count_swa": 32, "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0, "rope.freq_base_swa": 10000.0,
    }, variant="moe", bound=1e-5),
    Arch("gemma3n", "window + shared", "Gemma 3n E2B, E4B", {
        "block_count": 24, "embedding_length": 64, "feed_forward_length": 96, "attention.key_length": 32,
        "attention.value_length": 32,
    }, bound=1e-3),
    Arch("llama4", "chunked", "Llama 4 Scout"),
    Arch("qwen35", "hybrid", "Qwen3.5 0.8B to 9B, Qwen3.6-27B, Qwen3.8-27B", _GATED),
    Arch("qwen35moe", "hybrid", "Qwen3.5 and 3.6 35B-A3B", _GATED),
    Arch("qwen3next", "hybrid", "Qwen3-Next-80B-A3B, Qwen3-Coder-Next", _GATED),
    Arch("lfm2", "hybrid", "LFM2, LFM2.5", _EVERY_OTHER | {"attention.sliding_window": None}),
    Arch("lfm2moe", "hybrid", "LFM2-8B-A1B", _EVERY_OTHER | {"attention.sliding_window": None}),
    Arch("granitehybrid", "hybrid", "Granite 4 H", _EVERY_OTHER),
    Arch("nemotron_h", "hybrid", "Nemotron-H, Nemotron 3 Nano 4B", _NEMOTRON),
    Arch("nemotron_h_moe", "hybrid", "Nemotron 3 Nano 30B-A3B", _NEMOTRON),
    Arch("falcon-h1", "hybrid", "Falcon-H1"),
    Arch("jamba", "hybrid", "Jamba", _EVERY_OTHER),
    Arch("plamo2", "hybrid", "PLaMo 2", _EVERY_OTHER | {"ssm.group_count": 0}),
    Arch("minimax-01", "hybrid", "MiniMax-Text-01"),
    Arch("deepseek2", "mla", "DeepSeek-V2, V3, R1, GLM-4.7-Flash", _LATENT, bound=1e-5),
    Arch("mistral4", "mla", "Mistral Large 3", _LATENT, bound=1e-5),
    Arch("kimi-linear", "hybrid + mla", "Kimi-Linear-48B", _LATENT_HYBRID),
    Arch("bailingmoe3", "hybrid + mla", "Ling 3", _LATENT_HYBRID | {
        "rope.dimension_sections": [8, 12, 12, 0], "kda.gate_lower_bound": -5.0, "kda.safe_gate": True,
        "swiglu_clamp_exp": [0.0, 4.0, 4.0, 4.0], "swiglu_clamp_shexp": [0.0, 5.0, 5.0, 5.0],
    }),
    Arch("kimi-k3", "hybrid + mla", "Kimi K3", _LATENT_HYBRID | {
        "attn_res.block_size": 12, "kda.gate_lower_bound": -5.0, "kda.safe_gate": True, "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
    }),
    *_all("alibi", "mpt refact bloom jais", metadata=_ALL_HEADS),
    Arch("grok", "alibi", "Grok"),
    *_all("recurrent", "mamba mamba2"),
    *_all("recurrent", "rwkv6 rwkv6qwen2 rwkv7 arwkv7", why_not="refused by its kind, as mamba is"),
    *_all(
        "sparse",
        "deepseek32 deepseek4 glm-dsa glm5-next hy_v4 dots3note minimax-m3 qwen4exp",
        why_not="runs on servers; refused by its name",
    ),
    *_all(
        "other",
        "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding"
        " llama-embed t5 t5encoder",
        why_not="an encoder",
    ),
    *_all("other", "dream llada llada-moe rnd1", why_not="diffusion"),
    *_all("other", "eagle3 dflash gemma4-assistant", why_not="a draft of another model"),
    *_all("other", "wavtokenizer-dec qwen3tts pockettts", why_not="audio"),
    *_all("other", "clip chameleon gptj graniteswitch", why_not="no text model that llama.cpp runs by itself"),
]  # fmt: skip


def names_in_llama_cpp() -> list[str]:
    """Every architecture that the pinned llama.cpp has a name for."""
    source = (ROOT / "vendor" / "llama.cpp" / "src" / "llama-arch.cpp").read_text()
    found = re.findall(r'\{\s*LLM_ARCH_\w+,\s*"([^"]+)"\s*\}', source)
    return [name for name in dict.fromkeys(found) if name != "(unknown)"]


def common_metadata() -> dict[str, Any]:
    """Metadata that some architecture asks for; none minds those that it does not know."""
    return {
        "context_length": 2048,
        "embedding_length": 128,
        "block_count": 4,
        "feed_forward_length": 192,
        "leading_dense_block_count": 1,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "residual_scale": 1.0,
        "embedding_scale": 1.0,
        "attention.scale": 0.177,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8,
        "attention.max_alibi_bias": 8.0,
        "attention.q_lora_rank": 64,
        "attention.kv_lora_rank": 64,
        "attention.sliding_window": 32,
        "rope.freq_base": 10000.0,
        "rope.dimension_sections": [4, 4, 4, 4],
        "full_attention_interval": 2,
        "ssm.inner_size": 256,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 32,
        "ssm.time_step_rank": 4,
        "ssm.group_count": 2,
        "kda.head_dim": 32,
        "shortconv.l_cache": 3,
        "expert_count": 4,
        "expert_used_count": 4,  # all: a choice would flip by the smallest difference
        "expert_feed_forward_length": 64,
        "expert_shared_feed_forward_length": 64,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "expert_group_scale": 1.0,
        "experts_per_group": 1,
        "interleave_moe_layer_step": 2,
        "moe_every_n_layers": 2,
        "swin_norm": False,
    }
