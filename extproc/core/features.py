"""Which adapters an engine serves: one table of what trainers write, how each thing shows, and what each engine makes of it.

The stager refuses by this table before it fetches weights, the simulated engine refuses by it when it loads, and README shows it: so none of the
three can know another rule. Read in the sources of vLLM 0.24 to 0.32 (`vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`) and of SGLang 0.5.23
(`srt/lora/lora.py`, `lora_config.py`, `mem_pool.py`).

An adapter comes in as two values: `adapter_config.json` as the mapping that JSON gives, and the header of its weights as tensor name -> shape.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

Config = Mapping[str, object]
Shapes = Mapping[str, Sequence[int]]

VLLM, SGLANG = "vllm", "sglang"
ENGINES = {VLLM: "vLLM", SGLANG: "SGLang"}


class Verdict(Enum):
    """What an engine makes of a feature."""

    SERVES = "yes"
    REFUSES = "refuses it"
    IGNORES = "loads it, answers without it"  # worse than a refusal: status 200, and the words of the base model or of half an adapter


# (first version that does so, "" for all that came before, what it does); in order
History = tuple[tuple[str, Verdict], ...]
_SERVES: History = (("", Verdict.SERVES),)
_REFUSES: History = (("", Verdict.REFUSES),)
_IGNORES: History = (("", Verdict.IGNORES),)
_REFUSES_SINCE_0_32: History = (("", Verdict.IGNORES), ("0.32", Verdict.REFUSES))


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """One row of the table. `shown_by` is Markdown for README and text for messages; `shows` is None where tensors show the feature.

    `ignored` says what happens where an engine ignores it, `cure` what the adapter's author can do.
    """

    name: str
    shown_by: str
    vllm: History
    sglang: History
    cure: str = ""
    ignored: str = "would load the adapter and answer as if that were not there"
    shows: Callable[[Config], bool] | None = None

    def verdict(self, engine: str, version: str = "") -> Verdict:
        """Of that version of the engine; of the newest that is known where `version` has no number, as "" and a build's own name have none."""
        history, numbers = self.sglang if engine == SGLANG else self.vllm, _numbers(version)
        reached = [verdict for since, verdict in history if not numbers or _numbers(since) <= numbers]
        return reached[-1]


@dataclass(frozen=True, slots=True)
class Found:
    """A feature that an adapter has; `where` is the first tensor that shows it, with what of it does so, or "" for the configuration."""

    feature: Feature
    where: str = ""

    def refusal(self, engine: str, version: str = "") -> str:
        """The sentence for whoever asked for the adapter; "" if the engine serves it."""
        verdict = self.feature.verdict(engine, version)
        if verdict is Verdict.SERVES:
            return ""
        shown = self.where or f"has {self.feature.shown_by.replace('`', '')}"
        does = f"refuses {self.feature.name}" if verdict is Verdict.REFUSES else self.feature.ignored
        return f"{shown}: {ENGINES[engine]} {does}" + (f"; {self.feature.cure}" if self.feature.cure else "")


# What the five of these do to the base model, they do before training only, or in training only: what is saved is a plain LoRA.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
WHOLE_MODULES = frozenset({"classifier", "score"})  # that vLLM takes from `modules_to_save`
# Names that wrappers of a training framework put before the module's own: torch.compile, FSDP, activation checkpointing, DeepSpeed.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
FIRST_WRAPPER = "module"  # DistributedDataParallel's; as the first part only, since a model may have a module of that name further down

MAX_RANK = 2**31 - 1  # of an int in the engines' kernels; the highest that vLLM can be started for is 512
MAX_SCALE = 3e38  # of lora_alpha; BF16 and F32 end at 3.4e38: weights that are scaled beyond are infinities, which can spoil others' answers
MAX_TOLD_CHARACTERS = 100  # of a name in a message; real ones have up to 150, and begin alike

PREFIX = "base_model.model."  # what PEFT puts before the base model's own names
BASE_WEIGHTS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def _is_set(key: str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(key))


def _whole_modules(config: Config) -> frozenset[str]:
    modules = config.get("modules_to_save")
    return frozenset(map(str, modules)) if isinstance(modules, list) else frozenset({str(modules)} if modules else ())


def _changes_the_base(config: Config) -> bool:
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower() not in PLAIN_INITS


def _is_other_method(config: Config) -> bool:
    method = config.get("peft_type")
    return method is not None and str(method).upper() != "LORA"


OTHER_METHOD = Feature("other methods than LoRA", "a `peft_type` that is not LORA", _REFUSES, _REFUSES, shows=_is_other_method)
NO_METHOD = Feature("a configuration without a method", "no `peft_type`", _SERVES, _REFUSES, shows=lambda config: config.get("peft_type") is None)
DORA = Feature("DoRA", "`use_dora`", _REFUSES, _REFUSES, "train without it, or merge it", shows=_is_set("use_dora"))
CHANGED_BASE = Feature(
    "inits that change the base model (PiSSA, OLoRA, CorDA, LoftQ)", "`init_lora_weights` of such a kind", _REFUSES_SINCE_0_32, _IGNORES,
    "save it with PEFT's path_initial_model_for_weight_conversion", shows=_changes_the_base,
)  # fmt: skip
BIAS = Feature("trained biases", "`bias` other than none", _REFUSES, _IGNORES, shows=lambda config: config.get("bias", "none") != "none")
LORA_BIAS = Feature("biases of the LoRA matrices", "`lora_bias`", _REFUSES_SINCE_0_32, _IGNORES, shows=_is_set("lora_bias"))
ALORA = Feature("activated LoRA", "`alora_invocation_tokens`", _REFUSES_SINCE_0_32, _IGNORES, shows=_is_set("alora_invocation_tokens"))
REPLICATION = Feature("layers that are there twice", "`layer_replication`", _REFUSES_SINCE_0_32, _IGNORES, shows=_is_set("layer_replication"))
BDLORA = Feature("block-diagonal LoRA", "`use_bdlora`", _REFUSES_SINCE_0_32, _IGNORES, shows=_is_set("use_bdlora"))
QALORA = Feature("QA-LoRA", "`use_qalora`", _REFUSES_SINCE_0_32, _IGNORES, shows=_is_set("use_qalora"))
TOKENS = Feature("trained token embeddings", "`trainable_token_indices`", _REFUSES, _IGNORES, shows=_is_set("trainable_token_indices"))
HEAD = Feature(
    "a classification head that is saved whole", "`modules_to_save` of classifier or score", (("", Verdict.REFUSES), ("0.31", Verdict.SERVES)), _IGNORES,
    shows=lambda config: bool(_whole_modules(config)) and _whole_modules(config) <= WHOLE_MODULES,
)  # fmt: skip
WHOLE = Feature(
    "other modules that are saved whole", "`modules_to_save` of anything else", _REFUSES, _IGNORES, "train LoRA on them instead",
    shows=lambda config: not _whole_modules(config) <= WHOLE_MODULES,
)  # fmt: skip
PATTERNS = Feature(
    "ranks and scales of single modules", "`rank_pattern`, `alpha_pattern`", (("", Verdict.IGNORES), ("0.32", Verdict.SERVES)), _IGNORES,
    shows=lambda config: bool(config.get("rank_pattern") or config.get("alpha_pattern")),
)  # fmt: skip
RSLORA = Feature("rank-stabilised scale", "`use_rslora`", _SERVES, _IGNORES, shows=_is_set("use_rslora"))
EXPRESSION = Feature(
    "modules by a regular expression", "`target_modules` that is such a text", _SERVES, _REFUSES,
    shows=lambda config: isinstance(config.get("target_modules"), str) and config.get("target_modules") not in ("all", "all-linear"),
)  # fmt: skip
NO_TARGETS = Feature(
    "no target modules", "`target_modules` null", _SERVES, _REFUSES, shows=lambda config: config.get("target_modules", ()) is None,
)  # fmt: skip

EXPERTS = Feature(
    "experts in one tensor (`target_parameters`)", "`...experts.lora_A` and `...experts.base_layer.lora_A`, of rank r × experts", _SERVES, _IGNORES,
)  # fmt: skip
HALF_OF_EXPERTS = Feature(
    "one of the two tensors of experts without the other", "`...experts.lora_A` without `...experts.base_layer.lora_A`, or the reverse", _REFUSES, _IGNORES,
    "train gate_up_proj and down_proj",
)  # fmt: skip
EMBEDDING = Feature("LoRA on embeddings", "`lora_embedding_A`, `lora_embedding_B`", _SERVES, _SERVES)
BASE_WEIGHT = Feature("the base model's embeddings beside it, passed over", "`...embed_tokens.base_layer.weight`, `...lm_head...`", _SERVES, _SERVES)
BARE = Feature("names without PEFT's prefix", "names that do not begin with `base_model.model.`", _SERVES, _SERVES)
WRAPPED = Feature(
    "names with a wrapper's prefix", "`_orig_mod.`, `_fsdp_wrapped_module.`, `module.` and the like in names", _IGNORES, _SERVES,
    "save the unwrapped model", "finds no module of that name and would answer as the base model",
)  # fmt: skip
NAMED = Feature("names with an adapter's name inside", "`lora_A.default.weight`", _REFUSES, _SERVES, "save it with PEFT's save_pretrained")
OTHER_TENSOR = Feature("tensors that are no LoRA matrices", "any other tensor name", _REFUSES, _SERVES, "save the LoRA matrices alone")
ONE_SIDED = Feature("one matrix of a pair without the other", "`lora_A` without `lora_B`, or the reverse", _REFUSES, _IGNORES)
EMPTY = Feature("empty tensors", "a dimension of 0, as DeepSpeed ZeRO-3 saves what it did not gather", _REFUSES, _REFUSES, "gather the weights before saving")
NOT_A_MATRIX = Feature("matrices that are none", "a `lora_A` or `lora_B` without two dimensions", _REFUSES, _REFUSES)
OTHER_RANK = Feature(
    "another rank than the configuration's",
    "tensors whose rank is not `r`",
    _IGNORES,
    _REFUSES,
    "set r to the rank of the tensors",
    "would load it, scaled by the configuration's r",
)
NO_MATRIX = Feature("weights without LoRA matrices", "no `lora_A` or `lora_B` at all", _REFUSES, _IGNORES)

TABLE: tuple[Feature, ...] = (
    RSLORA, PATTERNS, EXPERTS, HALF_OF_EXPERTS, EMBEDDING, BASE_WEIGHT, BARE, EXPRESSION, NO_TARGETS, NO_METHOD, HEAD,
    WHOLE, DORA, CHANGED_BASE, BIAS, LORA_BIAS, ALORA, REPLICATION, BDLORA, QALORA, TOKENS, OTHER_METHOD,
    WRAPPED, NAMED, EMPTY, NOT_A_MATRIX, OTHER_TENSOR, OTHER_RANK, ONE_SIDED, NO_MATRIX,
)  # fmt: skip

# Of a configuration, what is read here; everything else may hold anything.
KEYS = frozenset({
    "peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "use_dora", "init_lora_weights",
    "bias", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "trainable_token_indices",
})  # fmt: skip


def complaint(config: Config) -> str:
    """What no engine can read in a configuration; "" if nothing."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_count(rank):
        return f"has r {_told(rank)}; a positive whole number is needed"
    if not _is_number(alpha):
        return f"has lora_alpha {_told(alpha)}; a number is needed"
    if "target_modules" not in config:
        return "has no target_modules"
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(ranks, Mapping) or not all(map(_is_count, ranks.values())):
        return "has a rank_pattern that is not an object of positive whole numbers"
    if not isinstance(alphas, Mapping) or not all(map(_is_number, alphas.values())):
        return "has an alpha_pattern that is not an object of numbers"
    return ""


def ranks(config: Config) -> frozenset[int]:
    """The ranks that its tensors may have, of a configuration without a complaint; the engine must take the highest."""
    pattern = config.get("rank_pattern")
    values = (config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ()))
    return frozenset(rank for rank in values if isinstance(rank, int))


def of_config(config: Config) -> Iterator[Found]:
    """What a configuration shows, in the table's order."""
    return (Found(feature) for feature in TABLE if feature.shows is not None and feature.shows(config))


def of_tensors(config: Config, shapes: Shapes) -> list[Found]:
    """What the weights show, each feature at the first tensor that shows it. Linear in the names' length. `config` is one without a complaint."""
    found: dict[Feature, Found] = {}
    allowed, whole = ranks(config), _whole_modules(config) & WHOLE_MODULES
    told_ranks = _told_ranks(allowed)
    divisor = math.gcd(*allowed)  # of r x experts; with a rank_pattern a part of what would be known by trying each rank
    sides: dict[str, int] = {}  # by module: 1 for lora_A, 2 for lora_B, 3 for both

    def show(feature: Feature, name: str, how: str = "") -> None:
        if feature not in found:
            found[feature] = Found(feature, f"tensor {_told(name)}{how}")

    for name, shape in shapes.items():
        parts = name.split(".")
        if 0 in shape:
            show(EMPTY, name, " is empty")
        if name.endswith(BASE_WEIGHTS):
            show(BASE_WEIGHT, name)
            continue
        if wrapped := _wrapped(name, parts):
            show(WRAPPED, name, wrapped)
        read = matrix(parts)
        if read is None:
            if parts[-2:-1] and parts[-2] in whole:
                show(HEAD, name)
            elif "lora_A" in parts or "lora_B" in parts:
                show(NAMED, name, " has another name than lora_A.weight or lora_B.weight")
            else:
                show(OTHER_TENSOR, name)
            continue
        module, side, is_embedding = read
        sides[module] = sides.get(module, 0) | (1 if side == "A" else 2)
        if is_embedding:
            show(EMBEDDING, name)
        if not name.startswith(PREFIX):
            show(BARE, name)
        if len(shape) != 2:
            if len(shape) != 3 or "experts" not in parts:  # shared experts are stacked
                show(NOT_A_MATRIX, name, f" has {len(shape)} dimensions")
            continue
        rank = shape[0] if side == "A" else shape[1]
        if _is_fused(module):
            show(EXPERTS, name)
            if rank % divisor:
                show(OTHER_RANK, name, f" has rank {rank}, which is no multiple of {divisor}")
        elif rank not in allowed:
            show(OTHER_RANK, name, f" has rank {rank}, the configuration {told_ranks}")
    for module, seen in sides.items():
        if seen != 3:
            found[ONE_SIDED] = Found(ONE_SIDED, f"module {_told(module)} has a lora_{'AB'[seen - 1]} alone")
            break
    if half := next((module for module in sides if _is_fused(module) and _other_half(module) not in sides), ""):
        found[HALF_OF_EXPERTS] = Found(HALF_OF_EXPERTS, f"module {_told(half)} is without {_told(_other_half(half))}")
    if not sides:
        found[NO_MATRIX] = Found(NO_MATRIX, "holds no lora_A or lora_B tensor")
    return sorted(found.values(), key=lambda one: TABLE.index(one.feature))


def matrix(parts: Sequence[str]) -> tuple[str, str, bool] | None:
    """The module, the side ("A" or "B") and whether it is an embedding's, of a tensor's name in its parts; None if vLLM reads no matrix in the name."""
    if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return ".".join(parts[:-1]), parts[-1][-1], True
    if parts[-1] == "weight" and len(parts) > 2 and parts[-2] in ("lora_A", "lora_B"):
        return ".".join(parts[:-2]), parts[-2][-1], False
    return None


def load_options(shapes: Shapes) -> dict[str, bool]:
    """What a load call must say of this adapter beside its name and path: that its experts are in one tensor. A vLLM with
    `--enable-mixed-moe-lora-format` reads that; others pass over it.
    """
    fused = any(read is not None and _is_fused(read[0]) for read in (matrix(name.split(".")) for name in shapes))
    return {"is_3d_lora_weight": True} if fused else {}


def features_table() -> str:
    """The table in Markdown, as README shows it."""
    rows = [f"| What | Shown by | {' | '.join(ENGINES.values())} |", "|---|---|---|---|"]
    rows += [f"| {one.name} | {one.shown_by} | {_told_history(one.vllm)} | {_told_history(one.sglang)} |" for one in TABLE]
    return "\n".join(rows) + "\n"


def _told_history(history: History) -> str:
    (_, first), *later = history
    return ", ".join([first.value, *(f"since {version} {verdict.value}" for version, verdict in later)])


def _wrapped(name: str, parts: Sequence[str]) -> str:
    """What of a tensor's name a wrapper has added; "" if nothing."""
    if parts[0] == FIRST_WRAPPER or (parts[2:3] == [FIRST_WRAPPER] and name.startswith(PREFIX)) or not WRAPPERS.isdisjoint(parts):
        return " has a wrapper's name in its own"
    return f" has {PREFIX} in its middle" if f".{PREFIX}" in name and not name.startswith(PREFIX) else ""


def _is_fused(module: str) -> bool:
    return module.endswith((".experts", ".experts.base_layer"))


def _other_half(module: str) -> str:
    """Where PEFT saves the other of a layer's two tensors of experts; one parameter alone is always in `...experts`, whichever it is."""
    return module.removesuffix(".base_layer") if module.endswith(".base_layer") else f"{module}.base_layer"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_SCALE  # false for NaN, too


def _told(value: object) -> str:
    """A value of the adapter's in a message: short, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= MAX_TOLD_CHARACTERS else f"{value[:MAX_TOLD_CHARACTERS]}…")
    if isinstance(value, int) and abs(value) > MAX_RANK:
        return "of more digits than any"
    return repr(value) if value is None or isinstance(value, int | float) else f"of type {type(value).__name__}"


def _told_ranks(values: frozenset[int]) -> str:
    several = sorted(values)
    return str(several[0]) if len(several) == 1 else f"one of {', '.join(map(str, several[:4]))}{', …' if len(several) > 4 else ''}"


def _numbers(version: str) -> tuple[int, ...]:
    """0.32.1rc1+cpu -> (0, 32, 1): what a comparison needs."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
