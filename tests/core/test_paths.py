"""What every path of both engines is, however it is spelled."""

import string
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.paths import ADMINISTRATION_PATHS, CLIENT_PATHS, Kind, Paths, is_administration, is_path
from extproc.errors import Forbidden, RequestError, UnknownPath

PATHS = Paths()

# Every path that the engines register, read from their wheels by hand: independent of the lists in paths.py. `{...}` is filled in.
VLLM = {  # 0.33.0, vllm/entrypoints/
    "computation": """
        /v1/chat/completions /v1/chat/completions/batch /v1/completions /v1/responses /v1/messages /v1/messages/count_tokens /cohere/v2/chat
        /cohere/v2/chat/render /generative_scoring /v1/decisions /v1/systemone /v1/chat/completions/render /v1/completions/render
        /v1/messages/render /v1/responses/render /v1/chat/completions/derender /v1/completions/derender /inference/v1/generate /pooling /classify
        /v1/embeddings /v2/embed /score /v1/score /rerank /v1/rerank /v2/rerank /tokenize /detokenize /v1/audio/transcriptions
        /v1/audio/translations /invocations
    """,
    "stateful": """
        /v1/responses/resp_1 /v1/responses/resp_1/cancel /v1/realtime
    """,
    "listing": """
        /v1/models
    """,
    "health": """
        /health /ping /version /load /ready
    """,
    "administration": """
        /inference/v1/abort_requests /tokenizer_info /kv_event_sources /metrics /metrics/x /openapi.json /docs /docs/oauth2-redirect /redoc
        /static/x.js /v1/load_lora_adapter /v1/unload_lora_adapter /adapters /adapters/acme /start_profile /stop_profile /scale_elastic_ep
        /is_scaling_elastic_ep /fault_tolerance/apply /fault_tolerance/status /server_info /reset_prefix_cache /reset_mm_cache /reset_encoder_cache
        /collective_rpc /sleep /release_kv_cache_memory /wake_up /is_sleeping /pause /resume /abort_requests /is_paused /init_weight_transfer_engine
        /shutdown_weight_transfer_engine /start_weight_update /start_draft_weight_update /update_weights /finish_weight_update
        /update_weight_version /weight_checker /weight_info /get_world_size
    """,
}
SGLANG = {  # 0.5.23, sglang/srt/entrypoints/http_server.py
    "computation": """
        /v1/completions /v1/chat/completions /v1/embeddings /v1/classify /v1/score /v1/decisions /v1/systemone /v1/responses /v1/rerank /v1/messages
        /v1/messages/count_tokens /v1/tokenize /tokenize /v1/detokenize /detokenize /v1/audio/transcriptions /invocations /vertex_generate /generate
        /encode /classify /parse_function_call /separate_reasoning /api/chat /api/generate
    """,
    "stateful": """
        /v1/responses/resp_1 /v1/responses/resp_1/cancel /v1/realtime
    """,
    "listing": """
        /v1/models /v1/models/acme/sql
    """,
    "health": """
        /ready /health /health_generate /ping /v1/loads
    """,
    "administration": """
        /server_info /get_server_info /open_session /close_session /set_internal_state /dumper/dump /flush_cache /start_profile /stop_profile
        /set_trace_level /freeze_gc /start_expert_distribution_record /stop_expert_distribution_record /dump_expert_distribution_record
        /get_weights_by_name /release_memory_occupation /resume_memory_occupation /weights_checker /slow_down /configure_logging
        /add_external_corpus /remove_external_corpus /hicache/storage-backend/clear /update_weights_from_disk
        /init_weights_send_group_for_remote_instance /send_weights_to_remote_instance /init_weights_update_group /destroy_weights_update_group
        /update_weights_from_tensor /begin_weight_update /end_weight_update /update_weights_from_distributed /update_weights_from_ipc
        /update_weight_version /pd_role_switch /load_lora_adapter /load_lora_adapter_from_tensors /unload_lora_adapter /abort_request
        /pause_generation /continue_generation /list_external_corpora /get_remote_instance_transfer_engine_info
        /remote_instance_transfer_engine_info /hicache/storage-backend /get_hicache_l3_cache_layout /scale_elastic_ep /is_scaling_elastic_ep
        /metrics /metrics/x /openapi.json /docs /docs/oauth2-redirect /redoc
    """,
}
NOT_SERVED = {
    "/": "SGLang's imitation of Ollama: `Ollama is running`",
    "/api/tags": "the same: what one engine has loaded, in Ollama's words",
    "/api/show": "the same, of one model",
    "/model_info": "SGLang's: the directory of the weights",
    "/get_model_info": "the same, by its older name",
    "/readyz": "of vLLM's supervisor of several engines, a server of its own",
    "/v1/images/generations": "SGLang's diffusion server, which knows no adapters of ours; the settings may add it",
    "/v1/videos": "the same",
}
KINDS = {
    "computation": {Kind.INFERENCE, Kind.MODEL_OPTIONAL},
    "stateful": {Kind.STATEFUL},
    "listing": {Kind.LISTING},
    "health": {Kind.HEALTH},
}


def paths_of(what: str) -> list[str]:
    return sorted({*VLLM[what].split(), *SGLANG[what].split()})


def respelled(path: str) -> list[str]:
    """The same path for an engine, or for something before it: with a query, a slash at its end, escapes."""
    first, rest = path[1], path[2:]
    escaped = f"/%{ord(first):02x}{rest}"
    return [path, f"{path}?a=b", f"{path}?", f"{path}/", f"{path}/?x=/v1/models", escaped, escaped.upper()[:4] + rest, "/" + quote(path[1:], safe="")]


@pytest.mark.parametrize("what", KINDS)
def test_what_engines_serve_to_clients_is_reached(what: str) -> None:
    """Each as what it is, by any spelling that an engine's framework takes for it."""
    for path in paths_of(what):
        for spelled in respelled(path):
            found = PATHS.path(spelled)
            assert (found.kind in KINDS[what], found.text) == (True, path), spelled


@pytest.mark.parametrize("path", sorted({*paths_of("administration"), *ADMINISTRATION_PATHS}))
def test_an_engines_administration_is_never_reached(path: str) -> None:
    """Neither itself nor what is below it, and called what it is."""
    for spelled in [*respelled(path), f"{path}/below", f"{path}/below?x=/v1/models", f"{path}/", f"{path}%2fbelow"]:
        with pytest.raises(Forbidden, match="is the engine's own administration, which is not for clients"):
            PATHS.path(spelled)


ODD = [
    "/{}", "//{}", "///{}", "/./{}", "/x/../{}", "/%2e/{}", "/%2e%2e/{}", "/{}//", "/{}/.", "/{}/..", "/{};x", "/{}%00", "/{}%0a", "/{}%20", "/ {}", "{}",
    "/%2f{}", "/{}#x", "/\\{}", "/{}\\", "/v1/models/../../{}", "/v1/models/..%2f..%2f{}", "/v1/models/%2e%2e/%2e%2e/{}", "/v1/models//{}", "/v1/models/x/./../../{}",
    "/v1/responses/../../{}", "/v1/responses/..%2F..%2F{}/cancel", "/v1/conversations/../../{}", "/v1/conversations/%2e%2e%2f%2e%2e%2f{}", "/v1/../{}",
    "http://engine/{}", "*", "", "?/{}",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_no_odd_spelling_reaches_administration(odd: str) -> None:
    """Whatever a proxy or a framework makes of doubled slashes, dots, controls and the case of letters: it is refused here."""
    for path in [*paths_of("administration"), *NOT_SERVED]:
        for name in (path[1:], path[1:].upper(), path[1:].title()):
            with pytest.raises((Forbidden, UnknownPath)):
                PATHS.path(odd.replace("{}", name))


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd != "/{}"])
def test_a_client_path_is_not_guessed(odd: str) -> None:
    """A spelling that engines answer with 404 or a redirection is not what it looks like, so the kind would be a guess."""
    for path in ("/v1/chat/completions", "/tokenize", "/health", "/v1/models"):
        with pytest.raises(UnknownPath):
            PATHS.path(odd.replace("{}", path[1:]))


@pytest.mark.parametrize(
    "path", ["/V1/chat/completions", "/v1/Chat/Completions", "/HEALTH", "/v1/models2", "/v1", "/v1/chat", "/healthz", "/v1/responses", "/v1/load"]
)
def test_case_and_whole_parts_count(path: str) -> None:
    """As they do for the engines' frameworks."""
    if path == "/v1/responses":
        assert PATHS.path(path).kind is Kind.INFERENCE
    else:
        with pytest.raises(UnknownPath, match=r"is no path that is served here; `router\.paths` lists those that are"):
            PATHS.path(path)


@pytest.mark.parametrize("path", NOT_SERVED)
def test_what_is_left_out_is_refused(path: str) -> None:
    """The reason stands in the table."""
    with pytest.raises(RequestError):
        PATHS.path(path)


def test_the_name_in_the_path_of_a_card_is_decoded_once() -> None:
    """It may have slashes, escaped or not, and is no path of its own."""
    for raw, model in (
        ("/v1/models/base", "base"),
        ("/v1/models/acme/sql", "acme/sql"),
        ("/v1/models/acme%2Fsql", "acme/sql"),
        ("/v1/models/acme%252Fsql", "acme%2Fsql"),
        ("/v1/models/a%20b?x=1", "a b"),
        ("/v1/models/%C3%A9/", "é"),
        ("/v1/models/sleep", "sleep"),
    ):
        found = PATHS.path(raw)
        assert (found.kind, found.model) == (Kind.LISTING, model)
    assert PATHS.path("/v1/models").model == PATHS.path("/v1/models/").model == ""


def test_an_id_is_one_part_of_a_path() -> None:
    """What is below it is another path."""
    assert PATHS.path("/v1/responses/resp_1").kind is Kind.STATEFUL
    assert PATHS.path("/v1/conversations/c/items/i").kind is Kind.STATEFUL
    for path in ("/v1/responses/a/b", "/v1/responses//cancel", "/v1/responses/a/cancel/b", "/v1/responses/a%2Fb/cancel", "/v1/responses/./cancel"):
        with pytest.raises(UnknownPath):
            PATHS.path(path)


def test_the_settings_say_what_is_served() -> None:
    """And what they add is inference; administration cannot be added, nor be reached by a pattern."""
    paths = Paths(("/v1/completions", "/ours/{id}", "/deep/{rest}", "/{rest}"))
    assert paths.path("/v1/completions").kind is paths.path("/ours/1").kind is paths.path("/deep/a/b").kind is Kind.INFERENCE
    assert [is_administration(path) for path in ("/sleep", "/sleep/x", "/sleepy", "/v1/sleep")] == [True, True, False, False]
    for path in ("/sleep", "/metrics", "/v1/load_lora_adapter"):
        with pytest.raises(Forbidden):
            paths.path(path)
    with pytest.raises(UnknownPath):
        Paths(("/v1/completions",)).path("/v1/chat/completions")


@pytest.mark.parametrize("path", [*CLIENT_PATHS, "/ours", "/a/{id}/b", "/a/{rest}"])
def test_what_can_stand_in_the_settings_can(path: str) -> None:
    """The default, for one."""
    assert is_path(path)


@pytest.mark.parametrize("path", ["", "ours", "/a b", "/a?b", "/a#b", "/a%2fb", "/a\nb", "/{name}", "/{id", "/{id}/{", "/é\x00"])
def test_what_is_no_path_cannot_stand_in_the_settings(path: str) -> None:
    """It would match nothing, or not what it seems to."""
    assert not is_path(path)


def test_what_the_client_sent_is_shown_in_part() -> None:
    """A path may have sixty kilobytes, and may hold anything."""
    for path in ("/" + "x" * 60_000, "/v1\n\x00\udcff", "/sleep/" + "%00" * 20_000):
        with pytest.raises(RequestError) as caught:
            PATHS.path(path)
        assert len(caught.value.message) <= 300
        assert caught.value.message.isprintable()


@given(
    st.text(string.printable, max_size=30)
    | st.lists(st.sampled_from(["/", "//", ".", "..", "%2e", "%2f", "%", "?", "v1", "models", "sleep", "x"]), max_size=12).map("".join)
)
def test_any_path_is_of_a_kind_or_refused(raw: str) -> None:
    """And what passes holds no part that another reader would take away."""
    try:
        found = PATHS.path(raw)
    except RequestError:
        return
    assert found.text.startswith("/")
    assert not {"", ".", ".."} & set(found.text[1:].split("/"))
    assert not is_administration(found.text)
