"""Every instrument of every process. A help text is the metric's definition; labels come from our enums and settings, never from a client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from . import __version__

_WAIT_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """A registry of its own, so that two processes' worth of instruments can live in one test."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Info("lora_extproc_build", "Version of this process.", registry=self.registry).info({"version": __version__})

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class DiscoveryMetrics:
    """Instruments of a process that follows sources of endpoints: a router, or a stager that finds its peers so."""

    def __init__(self, registry: CollectorRegistry) -> None:
        source = ["pool", "source"]
        self.endpoints = Gauge("lora_extproc_discovery_endpoints", "Endpoints that a source of discovery contributes now.", source, registry=registry)
        self.stale = Gauge(
            "lora_extproc_discovery_stale",
            "1 while what a source contributes is not what it shows: it has not answered yet, it fails, or it shows none and is not believed yet.",
            source,
            registry=registry,
        )
        self.failures = Counter("lora_extproc_discovery_failures", "Times that a source of discovery began to fail.", source, registry=registry)
        self.left_out = Gauge(
            "lora_extproc_discovery_left_out",
            "Entries of a source's last set that were left out, since they cannot be endpoints or repeat one.",
            source,
            registry=registry,
        )


class RouterMetrics(Metrics):
    """Instruments of the router."""

    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self._requests = Counter(
            "lora_extproc_requests",
            "Requests answered, by outcome (hit, staged, failover, pass, listed, rejected, abandoned) and, for rejected ones, the reason of the error table.",
            ["outcome", "reason"],
            registry=r,
        )
        self._answered: dict[tuple[str, str], Counter] = {}  # a label look-up costs more than the increment
        self.held_bytes = Gauge("lora_extproc_held_bytes", "Bytes of request bodies that are held now.", registry=r)
        self.queue_position = Histogram(
            "lora_extproc_queue_position",
            "How many requests waited for the same adapter when one more began to wait.",
            registry=r,
            buckets=(0, 1, 5, 20, 100, 500, 2000),
        )
        self.scan = Histogram(
            "lora_extproc_scan_seconds",
            "Time to judge one whole body of 16 KB or more, its way to another process included: JSON or a form, one model, decompression.",
            registry=r,
            buckets=(0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
        )
        self.share = Gauge("lora_extproc_owner_share", "Share of all keys that an endpoint owns: its slots / table size.", ["endpoint"], registry=r)
        self.served = Counter(
            "lora_extproc_served",
            "Responses for which the gateway told the endpoint that served, by whether it was the first of our list.",
            ["first"],
            registry=r,
        )
        self.prompt_blocks = Counter(
            "lora_extproc_prompt_blocks",
            "Blocks of the prompts that were sent, by whether the same endpoint had been sent them before, as far as this router remembers: "
            "known / (known + new) is the share of them that engines could take from their KV cache.",
            ["seen"],
            registry=r,
        )
        self.held = Gauge("lora_extproc_held_requests", "Requests that wait for an adapter now.", registry=r)
        self.wait = Histogram(
            "lora_extproc_wait_seconds",
            "From the moment the model was known to the answer, for requests that had to wait for a stager.",
            registry=r,
            buckets=_WAIT_BUCKETS,
        )
        self.open_streams = 0  # counted without the client library's lock: it changes twice per request
        Gauge("lora_extproc_streams", "ext_proc streams open now.", registry=r).set_function(lambda: self.open_streams)
        self.failovers = Counter("lora_extproc_failovers", "Candidates skipped because their stager could not serve, then the next was asked.", registry=r)
        self.hedges = Counter("lora_extproc_hedges", "Candidates asked beside one that made no progress for `router.hedge_s`.", registry=r)
        self.loop_stall = Histogram(
            "lora_extproc_loop_stall_seconds",
            "How late the event loop came to a tick that is due every 20 ms: the longest that one callback, or the machine, held up everybody.",
            registry=r,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1, 5),
        )
        self.loop_longest_stall = Gauge("lora_extproc_loop_longest_stall_seconds", "The longest of those since the last scrape.", registry=r)
        self.leases = Gauge("lora_extproc_leases", "Adapters, per endpoint, that are known to be on disk.", registry=r)
        self.endpoints = Gauge("lora_extproc_endpoints", "Endpoints by standing (ready, draining, down).", ["state"], registry=r)
        self.discovery = DiscoveryMetrics(r)
        self.prefetches = Counter(
            "lora_extproc_prefetches",
            "Prefetches that nodes were asked for, by what they rest on (idle_times, yesterday) and result: staged, loaded (only into the engine), hit (nothing"
            " was to be done), or the reason of the error table.",
            ["by", "result"],
            registry=r,
        )
        self.prefetches_ended = Counter(
            "lora_extproc_prefetches_ended",
            "Of those with result staged or loaded, by what they rest on: used (a request went there before it had left), or unused. Precision = used / (used +"
            " unused).",
            ["by", "result"],
            registry=r,
        )
        self.wakeups = Counter(
            "lora_extproc_wakeups",
            "First requests for adapters that were idle before, by for how long (short: 5 minutes or more, long: an hour or more) and where the adapter was found"
            " (memory, disk, nowhere). Recall = 1 - nowhere / all. Counted where router.prefetch is on.",
            ["idle", "found"],
            registry=r,
        )
        self.xds_streams = Gauge("lora_extproc_xds_streams", "xDS streams open now: one for each Envoy that follows this router by ADS.", registry=r)
        self.xds_responses = Counter("lora_extproc_xds_responses", "Updates sent to Envoys, by type (clusters, endpoints).", ["type"], registry=r)
        self.xds_answers = Counter(
            "lora_extproc_xds_answers",
            "Answers of Envoys to those, by type and result: ack, or nack where Envoy rejects the update and keeps what it has.",
            ["type", "result"],
            registry=r,
        )

    def answered(self, outcome: str, reason: str) -> None:
        """Count one request."""
        counter = self._answered.get((outcome, reason))
        if counter is None:
            counter = self._answered[outcome, reason] = self._requests.labels(outcome, reason)
        counter.inc()


class WorkersMetrics(Metrics):
    """Instruments of the process above the workers of a router."""

    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.workers = Gauge(
            "lora_extproc_workers", "Workers by what they do: serving, starting, leaving, or absent until they are started anew.", ["state"], registry=r
        )
        self.ended = Counter(
            "lora_extproc_workers_ended", "Workers that ended unasked, by why: died, hung, or late (did not serve in time).", ["why"], registry=r
        )
        self.given = Counter("lora_extproc_workers_connections", "Connections that were given to workers.", registry=r)
        self.moved = Counter(
            "lora_extproc_workers_moved", "Connections whose client was asked to make a new one, because another worker has less to do.", registry=r
        )


# What a router's gauges are over all its workers. Counters and histograms are summed.
SUMMED = frozenset({"lora_extproc_held_bytes", "lora_extproc_held_requests", "lora_extproc_streams", "lora_extproc_leases", "lora_extproc_xds_streams"})
LARGEST = frozenset({"lora_extproc_loop_longest_stall_seconds"})
ALIKE = frozenset(  # each worker says the same: one speaks for all
    {
        "lora_extproc_build_info",
        "lora_extproc_owner_share",
        "lora_extproc_endpoints",
        "lora_extproc_discovery_endpoints",
        "lora_extproc_discovery_stale",
        "lora_extproc_discovery_left_out",
    }
)


class StagerMetrics(Metrics):
    """Instruments of the stager."""

    def __init__(self) -> None:
        super().__init__()
        r = self.registry
        self.ensures = Counter("lora_extproc_ensures", "Ensure calls by result: hit, staged, or the reason of the error table.", ["result"], registry=r)
        self.node_prefetches = Counter(
            "lora_extproc_node_prefetches",
            "Prefetches that routers asked this node for, by result: staged, loaded (it was on disk, and the engine was told to know it), hit (nothing was to be"
            " done), or the reason of the error table.",
            ["result"],
            registry=r,
        )
        self.stages = Counter("lora_extproc_stages", "Flights that landed, by origin and result.", ["origin", "result"], registry=r)
        self.stage_seconds = Histogram(
            "lora_extproc_stage_seconds",
            "Duration of one phase of a flight: resolve, check, reserve, fetch, unpack, verify, publish.",
            ["phase"],
            registry=r,
            buckets=_WAIT_BUCKETS,
        )
        self.stage_total_seconds = Histogram(
            "lora_extproc_stage_total_seconds", "Duration of a whole flight, by origin and result.", ["origin", "result"], registry=r, buckets=_WAIT_BUCKETS
        )
        self.fetch_seconds = Histogram(
            "lora_extproc_fetch_seconds",
            "Duration of the transfer of one file, its repetitions included, by origin and result (fetched, failed).",
            ["origin", "result"],
            registry=r,
            buckets=_WAIT_BUCKETS,
        )
        self.fetched_bytes = Counter(
            "lora_extproc_fetched_bytes", "Bytes fetched, by origin and result of the file (fetched, failed).", ["origin", "result"], registry=r
        )
        self.flights = Gauge("lora_extproc_flights", "Flights in progress: fetches and comparisons with an origin.", registry=r)
        self.waiters = Gauge("lora_extproc_waiters", "Ensure calls that wait for a flight now.", registry=r)
        self.breaker = Gauge("lora_extproc_breaker", "State of an origin's breaker: 0 closed, 1 half-open, 2 open.", ["origin"], registry=r)
        self.verify_failures = Counter(
            "lora_extproc_verify_failures",
            "Adapters refused, by what was wrong (config, base_model, rank, feature, weights, pickle, size, digest, archive, incomplete, other), and"
            " artifacts that were found damaged on disk (disk).",
            ["what"],
            registry=r,
        )
        self.discovery = DiscoveryMetrics(r)
        self.peers = Gauge("lora_extproc_peers", "Other stagers that this one knows, and asks for copies.", registry=r)
        self.sent_bytes = Counter("lora_extproc_sent_bytes", "Bytes sent to other nodes.", registry=r)
        self.pinned = Gauge("lora_extproc_pinned", "Adapter names that are pinned, on disk or not.", registry=r)
        self.negative_hits = Counter(
            "lora_extproc_negative_hits", "Ensure calls answered from the memory of what no origin has, or refuses to give.", registry=r
        )
        self.evictions = Counter(
            "lora_extproc_evictions",
            "Removals by cause (room, watermark, asked, purge, refreshed, damaged) and result (removed, kept).",
            ["cause", "result"],
            registry=r,
        )
        self.engine_loads = Counter(
            "lora_extproc_engine_loads",
            "Adapters that the engine was told to know, by result: loaded, or the reason of the error table.",
            ["result"],
            registry=r,
        )
        self.engine_load_seconds = Histogram(
            "lora_extproc_engine_load_seconds", "Duration of one load into the engine, its turn included.", registry=r, buckets=_WAIT_BUCKETS
        )
        self.engine_names = Gauge("lora_extproc_engine_names", "Names that the engine knows because of this stager, one per version.", registry=r)
        self.engine_slots = Gauge(
            "lora_extproc_engine_slots", "Adapters that the engine runs at once (gpu) and keeps in memory (cpu); 0: not known.", ["kind"], registry=r
        )
        self.engine_demand = Gauge(
            "lora_extproc_engine_demand", "Adapters that compete for the engine's slots: those that a router holds a lease on.", registry=r
        )
        self.disk = Gauge("lora_extproc_disk_bytes", "Bytes on disk by kind: used, reserved, limit; used + reserved <= limit.", ["kind"], registry=r)
        self.adapters = Gauge("lora_extproc_adapters", "Adapter names that are on disk.", registry=r)
