"""The settings that the command line, the configuration file and Python share, each declared once.

Plain data: the command line makes its options from it, :func:`kvlocal.load` and the configurations their defaults and
checks, and ``tools/reference.py`` the table of docs/configuration.md.
"""

from __future__ import annotations

from kvlocal.setting import MAX_SEED, MAX_THREADS, MAX_TOKENS, Choice, File, Flag, Pairs, Real, Setting, Size, Whole

MODEL = File(
    "model",
    ("-m", "--model"),
    "Model",
    None,
    "A GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used.",
    "MODEL",
)
HF = Setting(
    "hf", ("-hf", "--hf"), "Model", None, "Model on Hugging Face; as MODEL hf:…", "USER/REPO[:FILE]", taker="command"
)
N_CTX = Whole("n_ctx", ("-c", "--ctx-size"), "Model", 0, "Context; 0: the model's, if memory allows.", high=MAX_TOKENS)
N_BATCH = Whole("n_batch", ("-b", "--batch-size"), "Model", 2048, "Tokens per logical batch.", low=1, high=MAX_TOKENS)
N_UBATCH = Whole(
    "n_ubatch", ("-ub", "--ubatch-size"), "Model", 512, "Tokens per physical batch.", low=1, high=MAX_TOKENS
)
N_THREADS = Whole("n_threads", ("-t", "--threads"), "Model", 0, "CPU threads; 0: physical cores.", high=MAX_THREADS)
N_GPU_LAYERS = Whole("n_gpu_layers", ("-ngl", "--n-gpu-layers"), "Model", 0, "Layers on the GPU.")
KERNELS = Choice(
    "kernels",
    ("--kernels",),
    "Model",
    "auto",
    "auto: page kernels, where the device that a layer's pages lie on has them, else stock operators; portable: stock "
    "operators everywhere, as a reference.",
    choices=("auto", "portable"),
)

POLICY = Setting(
    "policy",
    ("--policy",),
    "KV cache",
    "ladder",
    "Which tokens are kept; `kvlocal policies` lists them. With --kv the default is ada-snapkv: ladder stores each "
    "token as precisely as it is worth, and takes no --kv.",
    "NAME",
)
STORED_POLICY = "ada-snapkv"
"""The default of POLICY with --kv: the ladder says itself how tokens are stored."""
POLICY_ARGS = Pairs(
    "policy_args", ("--policy-arg",), "KV cache", None, "Set a parameter of the policy; may be repeated."
)
BUDGET = Size(
    "budget",
    ("--budget",),
    "KV cache",
    "2048",
    "How much is kept: 1024 (tokens per KV head and layer, on average), 25% (of the prompt) or 512MiB.",
)
KV = Setting(
    "storage",
    ("--kv",),
    "KV cache",
    "f16",
    "How what is kept is stored: f16, q8, q4, kv3, kv2 (16, 8.5, 4.5, 2.75 or 2.25 bits a value, but for sinks and the "
    "tail), kivi or logquant (3 bits; kivi:bits=4:group=64, logquant:quantizer=token).",
    "TYPE",
    "kv",
)
KV_TAIL = Whole("storage_tail", ("--kv-tail",), "KV cache", 128, "Latest tokens --kv leaves in f16.", keyword="kv_tail")
KV_SWA = Choice(
    "kv_swa",
    ("--kv-swa",),
    "KV cache",
    "f16",
    "How sliding windows are stored (Gemma 2 to 4, gpt-oss, others), which no budget changes.",
    choices=("f16", "q8"),
)
KV_SINK = Whole(
    "kv_sink", ("--kv-sink",), "KV cache", None, "First tokens that always stay: the policy's `sink`.", taker="command"
)
KV_WINDOW = Whole(
    "kv_window",
    ("--kv-window",),
    "KV cache",
    None,
    "Latest tokens that always stay: the policy's `window`.",
    taker="command",
)
RETRIEVE = Setting(
    "retrieve",
    ("--retrieve",),
    "KV cache",
    None,
    "Read a part of what is kept: attention, sentencekv, quest or recent.",
    "NAME",
)
RETRIEVE_ARGS = Pairs(
    "retrieve_args", ("--retrieve-arg",), "KV cache", None, "Set a parameter of the retriever; may be repeated."
)
RETRIEVE_BUDGET = Whole(
    "retrieve_budget", ("--retrieve-budget",), "KV cache", 1024, "Tokens per head that a token reads.", low=1
)
ARCHIVE = Setting(
    "archive",
    ("--archive",),
    "KV cache",
    "off",
    "Keep what memory loses on disk while this runs: auto, off, or a folder for it.",
    "DIR",
)
ARCHIVE_FORMAT = Choice(
    "archive_format",
    ("--archive-format",),
    "KV cache",
    "f16",
    "f16: as it was; q8: in half of that.",
    choices=("f16", "q8"),
)
RECALL = Choice(
    "recall",
    ("--recall",),
    "KV cache",
    None,
    "What --archive brings back: at every turn what a question asks for, at every step what --retrieve reads, or off.",
    choices=("turn", "step", "off"),
)
RECALL_BUDGET = Whole(
    "recall_budget", ("--recall-budget",), "KV cache", 256, "Tokens per head that a turn brings back.", low=1
)
PREFILL = Choice(
    "prefill",
    ("--prefill",),
    "KV cache",
    "exact",
    "exact: evict once, after the whole prompt; chunked: after every chunk, so that the peak is bounded.",
    choices=("exact", "chunked"),
)
CHUNK = Whole("chunk", ("--chunk",), "KV cache", 512, "Tokens per chunk of --prefill chunked.", low=1)
GUIDE = Whole(
    "guide",
    ("--guide",),
    "KV cache",
    0,
    "With --prefill chunked: the prompt's last N tokens (the question) decide what every chunk leaves.",
)
EVICT_EVERY = Whole(
    "evict_every",
    ("--evict-every",),
    "KV cache",
    32,
    "Tokens that a growing sequence may exceed the budget by until it is evicted again; 1: at every token.",
    low=1,
)

TEMP = Real(
    "temp",
    ("--temp",),
    "Sampling",
    0.8,
    "0: always the likeliest.",
    "T",
    noun="The temperature",
    high=100,
    taker="sampling",
)
TOP_K = Whole("top_k", ("--top-k",), "Sampling", 40, "Draw from the K likeliest; 0: from all.", taker="sampling")
TOP_P = Real("top_p", ("--top-p",), "Sampling", 0.95, "Nucleus; 1: off.", "P", above=True, taker="sampling")
MIN_P = Real("min_p", ("--min-p",), "Sampling", 0.05, "0: off.", "P", taker="sampling")
REPEAT_PENALTY = Real(
    "repeat_penalty",
    ("--repeat-penalty",),
    "Sampling",
    1.0,
    "1: off.",
    "X",
    noun="The repeat penalty",
    low=0.01,
    high=100,
    taker="sampling",
)
SEED = Whole(
    "seed",
    ("-s", "--seed"),
    "Sampling",
    -1,
    "The same seed gives the same text; -1: another one every time.",
    low=-1,
    high=MAX_SEED,
    taker="sampling",
)
IGNORE_EOS = Flag(
    "ignore_eos",
    ("--ignore-eos",),
    "Sampling",
    False,
    "Do not let the model end its answer before -n tokens.",
    taker="sampling",
)

N_PREDICT = Whole(
    "n_predict",
    ("-n", "--n-predict"),
    "Sampling",
    512,
    "Tokens to generate at most; -1: until the end of the context.",
    low=-1,
    taker="answer",
)
RAW = Flag(
    "raw",
    ("--no-chat-template",),
    "Prompt",
    False,
    "Continue the text as it is: no roles, no template.",
    taker="answer",
)
SYSTEM = Setting("system", ("-sys", "--system-prompt"), "Prompt", None, "System prompt.", "TEXT", taker="answer")

SETTINGS: tuple[Setting, ...] = (
    *(MODEL, HF, N_CTX, N_BATCH, N_UBATCH, N_THREADS, N_GPU_LAYERS, KERNELS),
    *(POLICY, POLICY_ARGS, BUDGET, KV, KV_TAIL, KV_SWA, KV_SINK, KV_WINDOW),
    *(RETRIEVE, RETRIEVE_ARGS, RETRIEVE_BUDGET, ARCHIVE, ARCHIVE_FORMAT, RECALL, RECALL_BUDGET),
    *(PREFILL, CHUNK, GUIDE, EVICT_EVERY),
    *(TEMP, TOP_K, TOP_P, MIN_P, REPEAT_PENALTY, SEED, IGNORE_EOS),
    *(N_PREDICT, RAW, SYSTEM),
)
"""All of them, in the order of the table."""
