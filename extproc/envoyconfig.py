"""Settings to a complete Envoy bootstrap, typed with envoy-data-plane, as YAML whose bytes depend on the settings alone.

What the configuration has to get right was measured on Envoy 1.36.4 and 1.40.0:
- The destination is read from dynamic metadata only. With the header as a second source Envoy joins both lists and tries a dead endpoint twice.
- A request that names no endpoint Envoy knows is answered 503: any other fallback would send it to an engine without the adapter.
- override_host does not skip endpoints that fail their health check; the router leaves them out.
- With a retry policy on the route, a full-duplex request that ends in trailers reaches the engine with its body doubled. Such requests are
  marked by the router and take a route without retries.
- Envoy acts on a change of health at once, and on those of the next second together at its end: of two routers that start together the one found later is
  asked nothing meanwhile, and with the other killed then all requests fail. For routers nothing is put off.
- With endpoints by xDS a host that was removed stays until its health check fails, unless the cluster says otherwise; and a route in the bootstrap that
  names a cluster of CDS makes Envoy end at its start, unless the routes are not compared with the clusters.
- `clear_route_cache` is not enough where the buffer limit is on the route: 1.36.4 answers 413 unless listener and cluster allow it too.

Importing this module takes a second: import it where it is used.
"""

import socket
from collections.abc import Sequence
from datetime import timedelta

import betterproto2
import yaml
from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
from envoy_data_plane.envoy.config.cluster import v3 as cluster
from envoy_data_plane.envoy.config.common.mutation_rules import v3 as rules
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
from envoy_data_plane.envoy.config.listener import v3 as listener
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel import v3 as cel
from envoy_data_plane.envoy.extensions.access_loggers.stream import v3 as stream_log
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router_filter
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation import v3 as early
from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host import v3 as override_host
from envoy_data_plane.envoy.extensions.load_balancing_policies.round_robin import v3 as round_robin
from envoy_data_plane.envoy.extensions.load_balancing_policies.subset import v3 as subset
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts import v3 as previous_hosts
from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as tls
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as upstream_http
from envoy_data_plane.envoy.type import v3 as envoy_type
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.envoy.type.metadata import v3 as metadata
from envoy_data_plane.google.protobuf import Any, Struct

from .config.pools import PoolSettings
from .config.settings import Settings
from .core import cors
from .core.endpoint import is_ip
from .core.exchange import NO_RETRY_HEADER
from .core.steering import DESTINATION_HEADER, LB_NAMESPACE, OWN_ANSWER, OWN_NAMESPACE
from .errors import BY_NAME, ConfigError

LOGGED_NOTES = ("model", "engine_model", "key", "owner", "outcome", "origin", "waited_ms", "reason")
EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
ROUTER_CLUSTER = "lora_extproc_router"
NODE = "lora-extproc"  # the id and the cluster by which Envoy calls itself, unless --service-node and --service-cluster do
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
UNLIMITED = 1_000_000  # for Envoy's circuit breakers; admission is the router's
MAX_MESSAGE_TIMEOUT_S = 3600.0  # Envoy refuses more
TCP_USER_TIMEOUT = 18  # linux/tcp.h; the standard library names it on Linux only
UPSTREAM_IDLE_S = 3.0  # below uvicorn's keep-alive of 5 s: never reuse a connection that the engine is closing
HOLD_MARGIN_S = 60.0  # the router's own deadline must be first to fire
CONNECT_FAILURES = "connect-failure,refused-stream,reset-before-request"  # never after the engine has read the request: it may have run
RETRY_BACK_OFF_S = 0.005  # the next endpoint is another machine: nothing to wait for
ROUTER_RETRIES = 3  # with one, the second choice was the dead router again for a dozen of 400 requests, until the health check missed it
ROUTER_PICKS = 30  # until one is another router: LEAST_REQUEST picks a dead one, which is idle, three times of four, and six times running in 18 % of retries
FIRST_CLUSTERS_S = 15.0  # Envoy's own default: so long it takes no clients while no router tells it where they would go
FIRST_ENDPOINTS_S = 2.0  # a router says nothing of a pool of which it has not seen an endpoint: the other pools do not wait longer for that one
XDS_BACK_OFF_S = 0.2, 2.0  # between attempts to follow a router, the first and the longest; Envoy's own default ends at 30 s
PING_S, PING_ANSWER_S = 2.0, 1.0  # what a router that hangs holds goes to another within three seconds
LOST_PACKETS_S = 2.0  # an engine's machine that acknowledges nothing for so long is gone; what it was sent fails, and may be sent again
ROUTER_FAILURES = "connect-failure,refused-stream,reset"  # a router's answer is repeatable until one has come


def render(settings: Settings) -> str:
    """The bootstrap as YAML, in the field order of Envoy's definitions. Raises ConfigError for what Envoy could not serve."""
    return yaml.safe_dump(build(settings).to_dict(casing=betterproto2.Casing.SNAKE), sort_keys=False, width=140)


def build(s: Settings) -> bootstrap.Bootstrap:
    """The bootstrap as a typed message."""
    _check(s)
    by_xds = s.envoy.endpoints == "xds"
    return bootstrap.Bootstrap(
        node=core.Node(id=NODE, cluster=NODE) if by_xds else None,
        admin=bootstrap.Admin(address=_socket(s.envoy.admin)) if s.envoy.admin else None,
        static_resources=bootstrap.BootstrapStaticResources(
            listeners=[_listener(s)],
            clusters=[_router_cluster(s), *([] if by_xds else [_pool(s, pool) for pool in sorted(s.clusters(), key=lambda p: p.name)])],
        ),
        dynamic_resources=_from_the_router() if by_xds else None,
    )


def clusters(s: Settings) -> dict[str, bytes]:
    """The cluster of each pool as CDS has it, encoded, by the pool's name."""
    return {pool.name: bytes(_pool(s, pool)) for pool in s.clusters()}


def _from_the_router() -> bootstrap.BootstrapDynamicResources:
    first_s, longest_s = XDS_BACK_OFF_S
    again = core.RetryPolicy(retry_back_off=core.BackoffStrategy(base_interval=_seconds(first_s), max_interval=_seconds(longest_s)))
    return bootstrap.BootstrapDynamicResources(
        ads_config=core.ApiConfigSource(
            api_type=core.ApiConfigSourceApiType.GRPC,
            transport_api_version=core.ApiVersion.V3,
            grpc_services=[core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=ROUTER_CLUSTER, retry_policy=again))],
            set_node_on_first_message_only=True,
        ),
        cds_config=_by_ads(FIRST_CLUSTERS_S),
    )


def _by_ads(first_s: float) -> core.ConfigSource:
    return core.ConfigSource(ads=core.AggregatedConfigSource(), initial_fetch_timeout=_seconds(first_s), resource_api_version=core.ApiVersion.V3)


def _check(s: Settings) -> None:
    served = s.clusters()
    if not served:
        raise ConfigError("pools: Envoy needs at least one")
    if s.router.steering == "endpoint" and len(served) != 1:
        raise ConfigError(f"router.steering: 'endpoint' names one cluster in the route; with {len(served)} pools use 'cluster'")
    if s.envoy.processing_mode != "FULL_DUPLEX_STREAMED" and s.envoy.hold_s > MAX_MESSAGE_TIMEOUT_S:
        raise ConfigError(f"envoy.hold_s: {s.envoy.hold_s:g} is over {MAX_MESSAGE_TIMEOUT_S:g}, Envoy's longest message_timeout")
    for pool in served:
        if s.envoy.endpoints == "static" and not pool.endpoints:
            raise ConfigError(f"envoy.endpoints: 'static' gives Envoy what the settings list, which is no endpoint for pool {pool.name!r}; use 'xds'")
        for endpoint_settings in pool.endpoints:
            host = endpoint_settings.address.rpartition(":")[0]
            if not is_ip(host):
                raise ConfigError(f"pools: {endpoint_settings.address}: Envoy's override_host knows endpoints by IP address, not by name")


def _listener(s: Settings) -> listener.Listener:
    manager = listener.Filter(name="envoy.filters.network.http_connection_manager", typed_config=Any.pack(_connection_manager(s)))
    return listener.Listener(
        name="lora_extproc",
        address=_socket(s.envoy.listen),
        per_connection_buffer_limit_bytes=s.router.max_body_bytes,  # what BUFFERED may hold (413 above it) and a retry can send again
        filter_chains=[listener.FilterChain(filters=[manager])],
    )


def _connection_manager(s: Settings) -> hcm.HttpConnectionManager:
    return hcm.HttpConnectionManager(
        stat_prefix="lora_extproc",
        codec_type=hcm.HttpConnectionManagerCodecType.AUTO,
        http2_protocol_options=core.Http2ProtocolOptions(max_concurrent_streams=1024),
        stream_idle_timeout=_seconds(_idle_s(s)),
        http_protocol_options=core.Http1ProtocolOptions(accept_http_10=True, default_host_for_http_10="lora-extproc"),  # nginx' default, ab
        upgrade_configs=_upgrades(s),
        normalize_path=True,  # paths are compared as the engine will read them
        merge_slashes=True,
        early_header_mutation_extensions=[_strip_client_headers(s)],
        access_log=[_access_log()],
        local_reply_config=_local_replies(s),
        http_filters=[
            hcm.HttpFilter(name="envoy.filters.http.ext_proc", typed_config=Any.pack(_ext_proc(s))),
            hcm.HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(router_filter.Router())),
        ],
        route_config=route.RouteConfiguration(
            name="lora_extproc",
            validate_clusters=False if s.envoy.endpoints == "xds" else None,
            virtual_hosts=[
                route.VirtualHost(
                    name="all",
                    domains=["*"],
                    include_attempt_count_in_response=True,
                    routes=[_route(s, retries=False), _route(s, retries=True)],
                )
            ],
        ),
    )


def _idle_s(s: Settings) -> float:
    """A stream is silent while its request is held, and while its answer is generated; the router and the engine must have spoken by then."""
    return max(s.envoy.hold_s, s.envoy.silence_s) + HOLD_MARGIN_S


def _upgrades(s: Settings) -> list[hcm.HttpConnectionManagerUpgradeConfig]:
    """WebSocket goes through where the router sees headers only; where it sees bodies, Envoy would wait for one that never ends (envoy #47161)."""
    return [hcm.HttpConnectionManagerUpgradeConfig(upgrade_type="websocket")] if s.envoy.processing_mode == "NONE" else []


def _strip_client_headers(s: Settings) -> core.TypedExtensionConfig:
    """Remove what only the router may set, before routing and before every filter."""
    names = (DESTINATION_HEADER, s.router.cluster_header, NO_RETRY_HEADER)
    return _extension(
        "envoy.http.early_header_mutation.header_mutation",
        early.HeaderMutation(mutations=[rules.HeaderMutation(remove=name) for name in names]),
    )


def _route(s: Settings, *, retries: bool) -> route.Route:
    by_header = s.router.steering == "cluster"
    marked = route.HeaderMatcher(name=NO_RETRY_HEADER, present_match=True)
    return route.Route(
        name="models" if retries else "models_without_retries",
        match=route.RouteMatch(prefix="/", headers=[] if retries else [marked]),
        request_body_buffer_limit=s.router.max_body_bytes,
        route=route.RouteAction(
            cluster=None if by_header else s.clusters()[0].name,
            cluster_header=s.router.cluster_header if by_header else None,
            timeout=timedelta(0),  # a generation has no upper bound; the idle timeout still ends dead streams
            idle_timeout=_seconds(_idle_s(s)),
            retry_policy=_retries(s) if retries else None,
        ),
    )


def _retries(s: Settings) -> route.RetryPolicy:
    """Walk the router's list: each attempt takes the next endpoint of it."""
    return route.RetryPolicy(
        retry_on=CONNECT_FAILURES,
        num_retries=max(1, s.router.max_retry_endpoints - 1),
        retry_back_off=route.RetryPolicyRetryBackOff(base_interval=_seconds(RETRY_BACK_OFF_S), max_interval=_seconds(RETRY_BACK_OFF_S * 10)),
    )


def _ext_proc(s: Settings) -> ext_proc.ExternalProcessor:
    send, skip = ext_proc.ProcessingModeHeaderSendMode.SEND, ext_proc.ProcessingModeHeaderSendMode.SKIP
    duplex = s.envoy.processing_mode == "FULL_DUPLEX_STREAMED"
    timeout = None if duplex else _seconds(min(s.envoy.hold_s, MAX_MESSAGE_TIMEOUT_S))  # no timer runs in full duplex
    return ext_proc.ExternalProcessor(
        grpc_service=core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=ROUTER_CLUSTER), retry_policy=_router_retries()),
        stat_prefix="router",
        failure_mode_allow=False,
        status_on_error=envoy_type.HttpStatus(code=envoy_type.StatusCode.ServiceUnavailable),
        message_timeout=timeout,
        max_message_timeout=timeout,
        processing_mode=ext_proc.ProcessingMode(
            request_header_mode=send,
            response_header_mode=skip,
            request_body_mode=ext_proc.ProcessingModeBodySendMode[s.envoy.processing_mode],
            response_body_mode=ext_proc.ProcessingModeBodySendMode.NONE,
            request_trailer_mode=send if duplex else skip,
            response_trailer_mode=skip,
        ),
        forward_rules=ext_proc.HeaderForwardingRules(allowed_headers=_headers_that_are_read(s)),
        metadata_options=ext_proc.MetadataOptions(receiving_namespaces=ext_proc.MetadataOptionsMetadataNamespaces(untyped=[LB_NAMESPACE, OWN_NAMESPACE])),
    )


def _headers_that_are_read(s: Settings) -> matcher.ListStringMatcher:
    """What the router reads, and nothing else: a client's Authorization and cookies stay in Envoy."""
    names = [":method", ":path", "content-type", "content-encoding", "content-length", "origin", "x-request-id"]
    names += [s.router.timeout_header, s.router.model_header, s.router.pool_header]
    hashed = s.router.policy().hash_on.header
    names += [name for name in (hashed, s.router.session_header) if name]
    names += ["traceparent", "tracestate"] if s.router.tracing else []
    return matcher.ListStringMatcher(patterns=[matcher.StringMatcher(exact=name.lower()) for name in dict.fromkeys(names)])


def _router_retries() -> core.RetryPolicy:
    """Ask another router where one is gone and its health check has not told yet. Envoy repeats what it has sent up to 64 KB, not more.

    With one of two routers killed twice under 200 small requests/s, 5 to 94 of 1,200 failed without this and none with it, three times each.
    """
    others = core.RetryPolicyRetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts", typed_config=Any.pack(previous_hosts.PreviousHostsPredicate())
    )
    return core.RetryPolicy(
        retry_on=ROUTER_FAILURES,
        num_retries=ROUTER_RETRIES,
        retry_back_off=core.BackoffStrategy(base_interval=_seconds(RETRY_BACK_OFF_S), max_interval=_seconds(RETRY_BACK_OFF_S * 10)),
        retry_host_predicate=[others],
        host_selection_retry_max_attempts=ROUTER_PICKS,
    )


def _access_log() -> accesslog.AccessLog:
    line = {
        "time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "protocol": "%PROTOCOL%",
        "status": "%RESPONSE_CODE%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "duration_ms": "%DURATION%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "cluster": "%UPSTREAM_CLUSTER%",
        "upstream": "%UPSTREAM_HOST%",
        "request_id": "%REQ(X-REQUEST-ID)%",
    } | {note: f"%DYNAMIC_METADATA({OWN_NAMESPACE}:{note})%" for note in LOGGED_NOTES}
    text = core.SubstitutionFormatString(json_format=Struct.from_dict(line))
    return accesslog.AccessLog(name="envoy.access_loggers.stdout", typed_config=Any.pack(stream_log.StdoutAccessLog(log_format=text)))


def _local_replies(s: Settings) -> hcm.LocalReplyConfig:
    """Envoy's own errors worded like the router's. The router's are recognised by their reason word and left as they are."""
    reasons = ", ".join(f"'{reason}'" for reason in sorted({OWN_ANSWER, *(error.reason for error in BY_NAME.values())}))
    size = f"the body is larger than {s.router.max_body_bytes} bytes, the limit"
    said = "%RESPONSE_CODE_DETAILS%"
    cases = [
        ("response.code_details == 'upgrade_failed'", f"WebSocket is not forwarded in processing mode {s.envoy.processing_mode}; it is in NONE"),
        ("response.code_details.startsWith('ext_proc_error')", "no router could be asked where this request goes; it may be sent again"),
        ("response.code == 413", size),
        ("response.code >= 400 && response.code < 500", f"the gateway refused the request: {said}"),
        ("true", f"the gateway could not forward the request: {said}"),
    ]
    return hcm.LocalReplyConfig(mappers=[_worded(s, f"!(response.code_details in [{reasons}]) && {when}", text) for when, text in cases])


def _worded(s: Settings, when: str, text: str) -> hcm.ResponseMapper:
    kind = "server_error" if "could" in text else "invalid_request_error"
    error = {"message": text, "type": kind, "param": None, "code": "gateway"}
    everybody = core.HeaderValueOption(
        header=core.HeaderValue(key="access-control-allow-origin", value=cors.ANY), append_action=core.HeaderValueOptionHeaderAppendAction.ADD_IF_ABSENT
    )
    return hcm.ResponseMapper(
        filter=accesslog.AccessLogFilter(
            extension_filter=accesslog.ExtensionFilter(
                name="envoy.access_loggers.extension_filters.cel", typed_config=Any.pack(cel.ExpressionFilter(expression=when))
            )
        ),
        headers_to_add=[everybody] if cors.ANY in s.router.cors_allow_origins else [],
        body_format_override=core.SubstitutionFormatString(json_format=Struct.from_dict({"error": error})),
    )


def _router_cluster(s: Settings) -> cluster.Cluster:
    # A router that hangs or is cut off is noticed although every stream on its connection is held.
    http2 = core.Http2ProtocolOptions(connection_keepalive=core.KeepaliveSettings(interval=_seconds(PING_S), timeout=_seconds(PING_ANSWER_S)))
    options = upstream_http.HttpProtocolOptions(explicit_http_config=upstream_http.HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=http2))
    addresses = [address.strip() for address in s.envoy.router.split(",")]
    are_ips = all(is_ip(address.rpartition(":")[0]) for address in addresses)
    return cluster.Cluster(
        name=ROUTER_CLUSTER,
        type=cluster.ClusterDiscoveryType.STATIC if are_ips else cluster.ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=_seconds(s.envoy.connect_timeout_s),
        circuit_breakers=_no_limits(),
        load_assignment=_assignment(ROUTER_CLUSTER, addresses),
        lb_policy=cluster.ClusterLbPolicy.LEAST_REQUEST,  # a router's streams are what it holds
        health_checks=[_router_health(s)],
        common_lb_config=cluster.ClusterCommonLbConfig(
            healthy_panic_threshold=envoy_type.Percent(value=10),  # only when none is left
            update_merge_window=timedelta(0),
        ),
        typed_extension_protocol_options={HTTP_OPTIONS: Any.pack(options)},
        transport_socket=_router_tls(s) if s.router.tls.mode != "off" else None,
    )


def _router_health(s: Settings) -> core.HealthCheck:
    """A replica that drains says NOT_SERVING and is asked no more; the only one there is goes on being asked (Envoy's panic mode)."""
    interval = _seconds(s.envoy.router_health_interval_s)
    return core.HealthCheck(
        timeout=_seconds(1),
        interval=interval,
        no_traffic_interval=interval,
        unhealthy_threshold=1,
        healthy_threshold=1,
        grpc_health_check=core.HealthCheckGrpcHealthCheck(service_name=EXT_PROC_SERVICE),
    )


def _router_tls(s: Settings) -> core.TransportSocket:
    ca = s.envoy.router_ca_file
    trusted = tls.CertificateValidationContext(trusted_ca=core.DataSource(filename=ca)) if ca else None
    common = tls.CommonTlsContext(alpn_protocols=["h2"], validation_context=trusted)
    return core.TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(tls.UpstreamTlsContext(common_tls_context=common)))


def _pool(s: Settings, pool: PoolSettings) -> cluster.Cluster:
    options = upstream_http.HttpProtocolOptions(
        common_http_protocol_options=core.HttpProtocolOptions(idle_timeout=_seconds(UPSTREAM_IDLE_S)),
        explicit_http_config=upstream_http.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=core.Http1ProtocolOptions()),
    )
    by_xds = s.envoy.endpoints == "xds"
    return cluster.Cluster(
        name=pool.name,
        type=cluster.ClusterDiscoveryType.EDS if by_xds else cluster.ClusterDiscoveryType.STATIC,
        eds_cluster_config=cluster.ClusterEdsClusterConfig(eds_config=_by_ads(FIRST_ENDPOINTS_S)) if by_xds else None,
        ignore_health_on_host_removal=by_xds,
        connect_timeout=_seconds(s.envoy.connect_timeout_s),
        per_connection_buffer_limit_bytes=s.router.max_body_bytes,
        upstream_connection_options=cluster.UpstreamConnectionOptions(
            tcp_keepalive=core.TcpKeepalive(keepalive_time=int(LOST_PACKETS_S), keepalive_interval=1, keepalive_probes=2)
        ),
        upstream_bind_config=_noticing_lost_packets(),
        circuit_breakers=_no_limits(),
        health_checks=[_health_check(s)],
        load_assignment=None if by_xds else _assignment(pool.name, [e.address for e in pool.endpoints]),
        load_balancing_policy=_policy("envoy.load_balancing_policies.override_host", _override_host()),
        typed_extension_protocol_options={HTTP_OPTIONS: Any.pack(options)},
    )


def _noticing_lost_packets() -> core.BindConfig:
    """TCP retransmits for a quarter of an hour before it gives up, while a client waits."""
    timeout_ms = int(LOST_PACKETS_S * 1000)
    option = core.SocketOption(
        description="TCP_USER_TIMEOUT", level=socket.IPPROTO_TCP, name=TCP_USER_TIMEOUT, int_value=timeout_ms, state=core.SocketOptionSocketState.STATE_PREBIND
    )
    return core.BindConfig(socket_options=[option])


def _override_host() -> override_host.OverrideHost:
    key = metadata.MetadataKey(key=LB_NAMESPACE, path=[metadata.MetadataKeyPathSegment(key=DESTINATION_HEADER)])
    nowhere = subset.Subset(  # no endpoint carries this key, and there is no fallback: 503 no_healthy_upstream
        fallback_policy=subset.SubsetLbSubsetFallbackPolicy.NO_FALLBACK,
        subset_selectors=[subset.SubsetLbSubsetSelector(keys=["lora_extproc_nowhere"])],
        subset_lb_policy=_policy("envoy.load_balancing_policies.round_robin", round_robin.RoundRobin()),
    )
    return override_host.OverrideHost(
        override_host_sources=[override_host.OverrideHostOverrideHostSource(metadata=key)],
        fallback_policy=_policy("envoy.load_balancing_policies.subset", nowhere),
    )


def _health_check(s: Settings) -> core.HealthCheck:
    interval = _seconds(s.envoy.health_interval_s)
    return core.HealthCheck(
        timeout=_seconds(1),
        interval=interval,
        no_traffic_interval=interval,  # Envoy's default for a cluster without traffic is 60 s
        unhealthy_threshold=2,
        healthy_threshold=1,
        http_health_check=core.HealthCheckHttpHealthCheck(path="/health"),
    )


def _no_limits() -> cluster.CircuitBreakers:
    most = cluster.CircuitBreakersThresholds(max_connections=UNLIMITED, max_pending_requests=UNLIMITED, max_requests=UNLIMITED, max_retries=UNLIMITED)
    return cluster.CircuitBreakers(thresholds=[most])


def _assignment(name: str, addresses: Sequence[str]) -> endpoint.ClusterLoadAssignment:
    members = [endpoint.LbEndpoint(endpoint=endpoint.Endpoint(address=_socket(address))) for address in addresses]
    return endpoint.ClusterLoadAssignment(cluster_name=name, endpoints=[endpoint.LocalityLbEndpoints(lb_endpoints=members)])


def _policy(name: str, config: betterproto2.Message) -> cluster.LoadBalancingPolicy:
    return cluster.LoadBalancingPolicy(policies=[cluster.LoadBalancingPolicyPolicy(typed_extension_config=_extension(name, config))])


def _extension(name: str, config: betterproto2.Message) -> core.TypedExtensionConfig:
    return core.TypedExtensionConfig(name=name, typed_config=Any.pack(config))


def _socket(address: str) -> core.Address:
    host, _, port = address.rpartition(":")
    return core.Address(socket_address=core.SocketAddress(address=host.strip("[]"), port_value=int(port)))


def _seconds(value: float) -> timedelta:
    return timedelta(seconds=value)
