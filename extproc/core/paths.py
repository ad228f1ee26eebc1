"""What a request's path is: inference with a body, state of one engine, a listing, health, administration, or unknown. Asked once per request.

The list is an allow-list. Engines add paths with every release, among them paths that load, pause or empty them, so a path that nobody has looked at
is answered 404 and does not reach an engine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote

from ..errors import Forbidden, UnknownPath


class Kind(Enum):
    """What a path is for, which decides whether a model has to be named and who may answer."""

    __hash__ = object.__hash__  # members are compared by identity; Enum's own hash is a call of Python code

    INFERENCE = "a body that names the model"
    MODEL_OPTIONAL = "a body that may name a model; without one the base model answers"
    STATEFUL = "what an earlier request left in the memory of one engine"
    LISTING = "which models there are"
    HEALTH = "whether the engine is well, and which it is"
    ADMINISTRATION = "the engine's own control"
    ECHO = "whatever a conformance test asks an echo server for"


# `{id}` stands for one part of a path, `{rest}` for all that follows.
# Read from the published wheels: vLLM 0.33.0, the routers below vllm/entrypoints/ (openai, anthropic, cohere, pooling, speech_to_text, scale_out,
# serve, generate); SGLang 0.5.23, sglang/srt/entrypoints/http_server.py.
_INFERENCE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions/batch",
    "/v1/decisions",
    "/cohere/v2/chat",
    "/api/chat",
    "/api/generate",
)
# Here engines take the base model where the body names none. The OpenAI API wants a name on the paths above, and so do we: whoever forgot it there
# would be answered by the wrong model, and not notice.
_MODEL_OPTIONAL = (
    "/v1/systemone",
    "/v1/classify",
    "/v1/score",
    "/v1/rerank",
    "/v1/tokenize",
    "/v1/detokenize",
    "/v2/embed",
    "/v2/rerank",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/tokenize",
    "/detokenize",
    "/invocations",
    "/generative_scoring",
    "/generate",
    "/encode",
    "/vertex_generate",
    "/parse_function_call",
    "/separate_reasoning",
    "/inference/v1/generate",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/responses/render",
    "/cohere/v2/chat/render",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
)
_STATEFUL = ("/v1/responses/{id}", "/v1/responses/{id}/cancel", "/v1/conversations", "/v1/conversations/{rest}", "/v1/realtime")
_LISTING = ("/v1/models", "/v1/models/{rest}")
_HEALTH = ("/health", "/health_generate", "/ping", "/ready", "/version", "/load", "/v1/loads")

CLIENT_PATHS: dict[str, Kind] = {
    **dict.fromkeys(_INFERENCE, Kind.INFERENCE),
    **dict.fromkeys(_MODEL_OPTIONAL, Kind.MODEL_OPTIONAL),
    **dict.fromkeys(_STATEFUL, Kind.STATEFUL),
    **dict.fromkeys(_LISTING, Kind.LISTING),
    **dict.fromkeys(_HEALTH, Kind.HEALTH),
}

# By the same wheels, and model_hosting_container_standards for `/adapters`. The list says no more than which word an answer has: what stands in
# neither list is not reachable either.
ADMINISTRATION_PATHS = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/load_lora_adapter_from_tensors",
    "/unload_lora_adapter",
    "/adapters",
    "/tokenizer_info",
    "/kv_event_sources",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/redoc",
    "/static",
    "/start_profile",
    "/stop_profile",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/fault_tolerance",
    "/server_info",
    "/get_server_info",
    "/model_info",
    "/get_model_info",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/collective_rpc",
    "/sleep",
    "/release_kv_cache_memory",
    "/wake_up",
    "/is_sleeping",
    "/pause",
    "/resume",
    "/abort_request",
    "/abort_requests",
    "/inference/v1/abort_requests",
    "/is_paused",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/weight_checker",
    "/weights_checker",
    "/weight_info",
    "/get_world_size",
    "/open_session",
    "/close_session",
    "/set_internal_state",
    "/get_internal_state",
    "/dumper",
    "/flush_cache",
    "/clear_hicache_storage_backend",
    "/hicache",
    "/get_hicache_l3_cache_layout",
    "/set_trace_level",
    "/freeze_gc",
    "/start_expert_distribution_record",
    "/stop_expert_distribution_record",
    "/dump_expert_distribution_record",
    "/get_weights_by_name",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/slow_down",
    "/configure_logging",
    "/add_external_corpus",
    "/remove_external_corpus",
    "/list_external_corpora",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/update_weights_from_ipc",
    "/begin_weight_update",
    "/end_weight_update",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/init_weights_send_group_for_remote_instance",
    "/send_weights_to_remote_instance",
    "/get_remote_instance_transfer_engine_info",
    "/remote_instance_transfer_engine_info",
    "/pd_role_switch",
    "/pause_generation",
    "/continue_generation",
    "/get_load",
)


@dataclass(frozen=True, slots=True)
class Path:
    """One request's path, as the rest of the walk needs it."""

    kind: Kind
    text: str  # decoded as the engine's framework decodes it, without the query
    model: str = ""  # of `/v1/models/{rest}`: whose card is asked for


class Paths:
    """The paths that clients may ask for. `allowed` are those of CLIENT_PATHS, and others, which then are inference."""

    def __init__(self, allowed: Sequence[str] = tuple(CLIENT_PATHS)) -> None:
        self._exact: dict[str, Path] = {}
        self._patterns: list[tuple[re.Pattern[str], Kind]] = []
        for text in allowed:
            kind = CLIENT_PATHS.get(text, Kind.INFERENCE)
            if "{" in text:
                self._patterns.append((_pattern(text), kind))
            else:
                self._exact[text] = Path(kind, text)

    def path(self, raw: str) -> Path:
        """What `raw`, the request's `:path`, is. Raises Forbidden for an engine's administration, UnknownPath for what is not allowed."""
        known = self._exact.get(raw)
        if known is not None:
            return known
        text = raw.partition("?")[0]
        if "%" in text:
            text = unquote(text)  # once, as the engine's framework does
        if len(text) > 1 and text.endswith("/"):
            text = text[:-1]  # frameworks answer it with a redirection to the path without the slash
        known = self._exact.get(text)
        if known is not None:
            return known
        if is_administration(text):  # before any pattern: `/v1/{rest}` is no way to it
            raise Forbidden(f"{_shown(text)} is the engine's own administration, which is not for clients")
        for pattern, kind in self._patterns:
            match = pattern.fullmatch(text)
            if match is not None:
                return Path(kind, text, match["rest"] if kind is Kind.LISTING else "")
        raise UnknownPath(f"{_shown(text)} is no path that is served here; `router.paths` lists those that are")


def is_administration(text: str) -> bool:
    """Whether an engine is controlled or looked into under this path, or below it."""
    return text.startswith(ADMINISTRATION_PATHS) and any(text == name or text.startswith(name + "/") for name in ADMINISTRATION_PATHS)


def is_path(text: str) -> bool:
    """Whether `text` can stand in the list of allowed paths."""
    return text.startswith("/") and text.isprintable() and not set(text) & set(" ?#%") and re.sub(r"\{(id|rest)\}", "", text).count("{") == 0


def _pattern(text: str) -> re.Pattern[str]:
    """No part may be empty, `.` or `..`: whatever normalises paths behind us would read another path."""
    part = r"(?!\.{1,2}(?:/|$))[^/]+"
    return re.compile(re.escape(text).replace(r"\{id\}", part).replace(r"\{rest\}", rf"(?P<rest>{part}(?:/{part})*)"), re.DOTALL)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")
