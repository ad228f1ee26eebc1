"""The cases as a table: what happens to which fleet under which load, and what is promised of it."""

from dataclasses import dataclass, field

from extproc.config.router import RouterSettings

from . import faults
from .faults import Script, during, ended, stopped
from .load import Kind, Rates
from .record import Bound, exactly, figure, held_at_most, none_failed, none_failed_twice, only_for, over_within
from .scripts import clients, disks, origins, processes, rotations
from .topology import Layout

WARM, COLD, BASE = Kind.WARM, Kind.COLD, Kind.BASE
HEDGE_S = 3.0  # router.hedge_s: then the next candidate is asked as well
ANSWER_S = 1.0  # what an answer may take once the right one is asked
NO_ENDPOINT_WAIT_S = 10.0  # router.no_endpoint_wait_s
NO_SPACE_WAIT_S = 4.0
BODY_S = 5.0
KEPT_S = 1.0  # a warm request is not held

MANY_COLD = Rates(cold=4.0)
SHORT_LEASES = {"lease_s": 4.0}  # a lease that is renewed is what tells a stager that an adapter is in use
COMPARED_S = 1.5  # a comparison, at an origin that holds back each of an adapter's files for 0.3 s
FEW_BYTES = 250_000  # twelve adapters of 20,480 bytes, as the disk counts them: enough for what is leased (test_cases.py)
NO_PEERS = {"peers": {"mode": "off"}}


def body_deadline() -> dict[str, float]:
    """The router's deadline for a body that stops arriving, shortened, where it has one."""
    return {name: BODY_S for name in RouterSettings.model_fields if name.startswith("body_") and name.endswith("_s")}


@dataclass(frozen=True, slots=True)
class Case:
    """`known`: why it is not held against the suite that a bound is missed."""

    name: str
    what: str
    script: Script
    bounds: tuple[Bound, ...]
    layout: Layout = field(default_factory=Layout)
    rates: Rates = field(default_factory=Rates)
    known: str = ""
    is_short: bool = False  # run by pytest, too


# A stager that is there and answers nothing, in whatever way: its leases count on, and who needs it goes to the next candidate.
UNANSWERING = (
    none_failed(),
    held_at_most(KEPT_S, WARM, BASE),
    held_at_most(HEDGE_S + ANSWER_S, COLD),
    over_within(5.0, WARM, COLD),
)
BACK_BY_ITSELF = figure("ready again after", disks.BACK_S - 1, f"the node is ready again within {disks.BACK_S:g} s", " s")
ROTATED = (
    figure("new taken after", 30.0, "what is new is taken within 30 s", " s"),
    figure("old refused after", rotations.TAKEN_S - 1, f"what is old is refused within {rotations.TAKEN_S:g} s", " s"),
)

CASES = (
    # -- parts that end
    Case("router_kill", "one of two routers is killed, and started again", during(ended(faults.router), 4, at_least=2), (none_failed(),), is_short=True),
    Case(
        "router_kill_only",
        "the only router is killed, and started at once",
        during(ended(faults.router), 0),
        (over_within(ANSWER_S, since="mend"), held_at_most(5.0)),
        Layout(routers=1),
    ),
    Case(
        "stager_kill_each",
        "stagers are killed in turn, each back before the next",
        processes.one_after_the_other,
        (none_failed(), figure("left in .staging", 0, "nothing is left in .staging")),
    ),
    Case(
        "stager_kill_all_30s",
        "all stagers are killed, and started again after 30 s",
        during(ended(faults.stagers), 30),
        (none_failed(WARM, BASE), held_at_most(KEPT_S, WARM, BASE), over_within(5.0, COLD, since="mend", over_s=5.0)),
    ),
    Case("node_death", "a node dies, comes back after 8 s, and dies for good", processes.node_twice, (none_failed_twice(),)),
    Case("engine_kill_and_back", "an engine is killed twice, and back after 4 s", processes.engine_twice, (none_failed_twice(),)),
    Case(
        "restart_of_the_only_node",
        "the only node's stager and engine are told to stop, and started again",
        processes.only_node_restarted,
        (none_failed_twice(), held_at_most(NO_ENDPOINT_WAIT_S)),
        Layout(nodes=1),
        is_short=True,
    ),
    Case(
        "owner_comes_back_cold",
        "a node dies, and comes back with an empty disk before a slow origin; the next candidate has its adapters by then",
        processes.owner_back_cold,
        (none_failed_twice(), none_failed(WARM, since="mend"), held_at_most(KEPT_S, WARM, since="mend")),
        Layout(settings={"stager": NO_PEERS}),
        Rates(cold=0.2),
    ),
    Case(
        "rolling_replacement",
        "a node is added, routers and stagers are replaced in turn, a node is removed",
        processes.rolling,
        (none_failed(), held_at_most(5.0)),
        Layout(late_nodes=1),
    ),
    Case(
        "drain_with_health_watch",
        "a router is told to stop, alone and while a probe watches its health",
        processes.drained_while_watched,
        (
            none_failed(),
            figure("longer with a Watch", 1.0, "it drains at most 1 s later with a Watch", " s", noise=0.5),
            exactly("Watches that were told", 2, "both Watches are told NOT_SERVING"),
        ),
    ),
    # -- parts that hang
    Case("stager_hang", "a stager is stopped for 10 s", during(stopped(faults.stager), 10, at_least=8), UNANSWERING, rates=MANY_COLD, is_short=True),
    Case(
        "stager_hang_beyond_leases",
        "a stager is stopped for 25 s, longer than its leases run",
        during(stopped(faults.stager), 25),
        UNANSWERING,
        Layout(settings={"stager": {"lease_s": 15.0}}),
        MANY_COLD,
    ),
    Case(
        "stager_accepts_but_never_speaks",
        "where a stager was, a port takes connections and never says a word, for 15 s",
        during(faults.silent_stager, 15),
        UNANSWERING,
        rates=MANY_COLD,
    ),
    Case(
        "engine_hang",
        "an engine is stopped for 20 s",
        during(stopped(faults.engine), 20, at_least=8),
        (none_failed_twice(), over_within(3.0, WARM, BASE)),
        is_short=True,
    ),
    Case(
        "router_hang",
        "one of two routers is stopped for 20 s",
        during(stopped(faults.router), 20, at_least=8),
        (none_failed_twice(), held_at_most(4.0)),
        is_short=True,
    ),
    Case(
        "peer_hang",
        "a peer hangs in the middle of a copy",
        origins.peer_stops,
        (
            none_failed(WARM, BASE),
            exactly("the copy was half way", 1, "the copy was half way"),
            figure("the hang cost", 2.0, "the copy costs at most 2 s more than the origin", " s", noise=0.5),
        ),
        Layout(settings={"stager": {"peers": {"max_bytes_per_s": 300_000}}}),
    ),
    # -- networks
    Case(
        "node_cut_off",
        "every packet from and to a node is lost, for 20 s",
        during(faults.cut_off, 20),
        (none_failed_twice(), held_at_most(5.0), over_within(5.0)),
        Layout(in_namespaces=True),
    ),
    Case(
        "stager_port_cut_off",
        "every packet from and to a stager's port is lost, for 20 s",
        during(faults.stager_cut_off, 20),
        UNANSWERING,
        Layout(in_namespaces=True),
        MANY_COLD,
    ),
    Case(
        "router_port_cut_off",
        "every packet from and to a router's port is lost, for 20 s",
        during(faults.router_cut_off, 20),
        (none_failed_twice(), held_at_most(4.0)),
        Layout(in_namespaces=True),
    ),
    # -- origins
    Case(
        "origin_one_bad",
        "one object of the origin answers 500, and is asked for twice a second, for 14 s",
        origins.one_bad,
        (
            none_failed(),
            figure("502 for the bad one", 1, "the bad one is answered 502", at_least=True),
            exactly("the bad one when it is well", 200, "and 200 when it is well"),
        ),
        rates=MANY_COLD,
        is_short=True,
    ),
    Case(
        "origin_outage",
        "the origin answers 500 for 8 s",
        during(faults.origin_down, 8, after=14),
        (none_failed(WARM, BASE), only_for("origin_failed", COLD), over_within(5.0, COLD, since="mend", over_s=5.0)),
        rates=MANY_COLD,
    ),
    Case(
        "origin_retry_after",
        f"the origin answers 503 with Retry-After: {origins.ASKED_TO_WAIT_S} once, while a transfer that began before breaks off",
        origins.asked_to_wait,
        (
            none_failed(WARM, BASE),
            figure("requests at the origin meanwhile", 0, "the origin is left alone that long"),
            over_within(5.0, COLD, since="mend", over_s=5.0),
        ),
        Layout(nodes=1, origin={"timeout_s": 4.0}),
        Rates(cold=2.0),
    ),
    # -- disks
    Case(
        "disk_full_all_leased",
        "file systems without room for a byte, everything on them leased, for 15 s",
        during(faults.full, 15),
        (none_failed(WARM, BASE), held_at_most(KEPT_S, WARM, BASE), held_at_most(NO_SPACE_WAIT_S, COLD), only_for("no_space", COLD)),
        Layout(disk="size=4m", settings={"router": {"no_space_wait_s": NO_SPACE_WAIT_S}}),
    ),
    Case(
        "disk_full_evictable",
        "room for twelve adapters per node and leases of 4 s, while more come",
        disks.evictable,
        (none_failed(), figure("evictions", 5, "at least 5 evictions", at_least=True)),
        Layout(settings={"stager": {"max_bytes": FEW_BYTES, **SHORT_LEASES}}),
        MANY_COLD,
    ),
    Case(
        "disk_full_before_max_bytes",
        "the same on a file system that is full long before max_bytes",
        disks.evictable,
        (none_failed(), figure("evictions", 5, "at least 5 evictions", at_least=True)),
        Layout(disk="size=250k", settings={"stager": SHORT_LEASES}),
        MANY_COLD,
    ),
    Case(
        "directory_removed",
        "rm -rf of all that is in a node's directory",
        disks.directory_removed,
        (none_failed_twice(), BACK_BY_ITSELF),
    ),
    Case(
        "entry_removed",
        "one adapter is removed from a node's .store, and its engine restarted",
        disks.entry_removed,
        (none_failed_twice(), exactly("it is on the disk again", 1, "it is fetched again")),
    ),
    Case(
        "directory_chmod",
        "a node's directory is chmod 000 for 8 s",
        disks.permissions_taken,
        (none_failed_twice(), exactly("the node says that it is not ready", 1, "the node says that it is not ready"), BACK_BY_ITSELF),
        Layout(obeys_permissions=True),
        MANY_COLD,
    ),
    # -- content
    Case(
        "replaced_in_use",
        "every warm adapter is replaced again and again, also while it is being fetched",
        origins.replaced,
        # a copy that is compared because another is newer still serves what the newer one has no room for
        (
            none_failed(),
            figure("old after new for", COMPARED_S, f"no old version {COMPARED_S:g} s after a new one", " s", noise=0.5),
            figure("old for", 8.0, "none that is over 8 s old", " s", noise=0.5),
        ),
        Layout(settings={"stager": {"revalidate_s": 2.0, **SHORT_LEASES}}),
    ),
    Case(
        "near_names",
        f"{len(origins.NEAR)} names that nearly collide",
        origins.near,
        (none_failed(), exactly("names with their own weights", len(origins.NEAR), "each is answered with its own weights")),
        is_short=True,
    ),
    # -- clients
    Case(
        "herd",
        f"{clients.HERD} requests for {clients.HERD_NAMES} new adapters in one moment",
        clients.herd,
        (
            none_failed(),
            exactly("answered well", clients.HERD, "all are answered well"),
            figure("fetches of one adapter", 3, "at most one fetch per adapter and node"),
        ),
    ),
    Case(
        "slow_clients",
        f"{clients.SLOW} clients send and read in small pieces, for 10 s",
        clients.slow,
        (
            none_failed(),
            held_at_most(KEPT_S, WARM, BASE),
            exactly("answered well", clients.SLOW, "all are answered well"),
            figure("open files more in Envoy", 20, "Envoy has at most 20 open files more than before"),
        ),
    ),
    Case(
        "body_stops_arriving",
        "a client sends half a body and stays connected",
        clients.body_stops,
        (
            none_failed(),
            exactly("status", 408, "it is answered 408"),
            exactly("has a reason of its own", 1, "with a reason of its own"),
        ),
        Layout(settings={"router": body_deadline()}),
        is_short=True,
    ),
    # -- rotation, clocks, and nothing at all
    Case(
        "token_rotation",
        "the token that routers and stagers share is replaced in its file, then a stager is restarted",
        rotations.token,
        (none_failed(), *ROTATED),
        Layout(credentials=rotations.Tokens),
    ),
    Case(
        "certificate_rotation",
        "another authority takes over in three steps, then a stager is restarted",
        rotations.certificates,
        (none_failed(), *ROTATED, figure("routers that take a stager of the old authority", 0, "no router takes a stager that shows the old authority's")),
        Layout(credentials=rotations.Certificates),
    ),
    Case(
        "clock_jumps",
        f"the wall clock goes {', '.join(processes.CLOCKS)}",
        processes.clocks,
        (none_failed(), held_at_most(5.0)),
        Layout(fakes_clocks=True),
    ),
    Case(
        "steady_load",
        "80 warm requests/s for a minute, and nothing happens",
        processes.steady,
        (
            none_failed(),
            held_at_most(KEPT_S, WARM, BASE),
            figure("MiB more, the worst process", 15.0, "no process grows by over 15 MiB", " MiB"),
            figure("open files more, the worst process", 40, "nor by over 40 open files"),
        ),
        rates=Rates(warm=80.0),
    ),
)

BY_NAME = {case.name: case for case in CASES}
