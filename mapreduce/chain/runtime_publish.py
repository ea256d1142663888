"""The calls with which a neuron publishes what others must know of it: its axon, its certificate,
its commitment. Knows their rules on the real chain; knows nothing of what the published data means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mapreduce.chain.calls import DispatchError, dispatchable, require_subnet

if TYPE_CHECKING:
    from mapreduce.chain.calls import CommitmentInfo, Dispatch

LOOPBACK: Final = {4: 0x7F000001, 6: 1}  # 127.0.0.1 and ::1: exactly these, as on the real chain
MAX_CERTIFICATE_BYTES: Final = 65  # one byte that names the algorithm, up to 64 of key

# Bounds of the pallet Commitments: fields of one commitment; bytes of a hotkey from epoch to epoch,
# of which every commitment counts some minimum.
MAX_FIELDS: Final = 3
MAX_SPACE_BYTES: Final = 3100
MIN_SPACE_BYTES: Final = 100

COMMITMENTS: Final = "Commitments"


@dispatchable("SubtensorModule", "serve_axon")
def _serve_axon(
    call: Dispatch,
    *,
    netuid: int,
    version: int,
    ip: int,
    port: int,
    ip_type: int,
    protocol: int,
    placeholder1: int,
    placeholder2: int,
) -> None:
    state = call.state
    require_subnet(state, netuid)
    if state.uid(netuid, call.signer) is None:
        raise DispatchError("HotKeyNotRegisteredInNetwork")
    if ip_type not in LOOPBACK:
        raise DispatchError("InvalidIpType")
    broadcast = 2**32 - 1 if ip_type == 4 else 2**128 - 1
    if ip >= broadcast or (state.genesis.strict and ip == LOOPBACK[ip_type]):
        raise DispatchError("InvalidIpAddress")
    previous = state.get("Axons", netuid, call.signer)
    limit = int(state.get("ServingRateLimit", netuid))
    if previous is not None and call.block - int(previous["block"]) < limit:
        raise DispatchError("ServingRateLimitExceeded")
    if port == 0:
        raise DispatchError("InvalidPort")
    axon = {
        "block": call.block,
        "version": version,
        "ip": ip,
        "port": port,
        "ip_type": ip_type,
        "protocol": protocol,
        "placeholder1": placeholder1,
        "placeholder2": placeholder2,
    }
    state.put("Axons", netuid, call.signer, value=axon)
    call.event("AxonServed", [netuid, call.signer])


@dispatchable("SubtensorModule", "serve_axon_tls")
def _serve_axon_tls(
    call: Dispatch,
    *,
    netuid: int,
    version: int,
    ip: int,
    port: int,
    ip_type: int,
    protocol: int,
    placeholder1: int,
    placeholder2: int,
    certificate: bytes,
) -> None:
    _serve_axon(
        call,
        netuid=netuid,
        version=version,
        ip=ip,
        port=port,
        ip_type=ip_type,
        protocol=protocol,
        placeholder1=placeholder1,
        placeholder2=placeholder2,
    )
    # As on the real chain: a certificate of another length is no error, it is just not stored.
    if 1 <= len(certificate) <= MAX_CERTIFICATE_BYTES:
        record = {"algorithm": certificate[0], "public_key": "0x" + certificate[1:].hex()}
        call.state.put("NeuronCertificates", netuid, call.signer, value=record)


@dispatchable(COMMITMENTS, "set_commitment")
def _set_commitment(call: Dispatch, *, netuid: int, info: CommitmentInfo) -> None:
    state, who = call.state, call.signer
    if state.uid(netuid, who) is None:
        raise DispatchError("AccountNotAllowedCommit")
    (fields,) = info["fields"]
    if len(fields) > MAX_FIELDS:
        raise DispatchError("TooManyFieldsInCommitmentInfo")
    epoch_index = int(state.get("SubnetEpochIndex", netuid))
    usage = state.ledger.get(COMMITMENTS, "UsedSpaceOf", [netuid, who])
    used_bytes = int(usage["used_space"]) if usage and usage["last_epoch"] == epoch_index else 0
    used_bytes += max(sum(_field_bytes(entry) for entry in fields), MIN_SPACE_BYTES)
    if used_bytes > MAX_SPACE_BYTES:
        raise DispatchError("SpaceLimitExceeded")
    usage = {"last_epoch": epoch_index, "used_space": used_bytes}
    state.ledger.put(COMMITMENTS, "UsedSpaceOf", [netuid, who], usage)
    record = {
        "deposit": 0,
        "block": call.block,
        "info": {"fields": [_as_stored(entry) for entry in fields]},
    }
    state.ledger.put(COMMITMENTS, "CommitmentOf", [netuid, who], record)
    state.ledger.put(COMMITMENTS, "LastCommitment", [netuid, who], call.block)
    call.event("Commitment", {"netuid": netuid, "who": who}, pallet=COMMITMENTS)


def _field_bytes(entry: Any) -> int:
    return 0 if isinstance(entry, str) else sum(len(data) for data in entry.values())


def _as_stored(entry: Any) -> Any:
    """A field as the SDK decodes it: bytes as hex."""
    if isinstance(entry, str):
        return entry
    return {variant: "0x" + data.hex() for variant, data in entry.items()}
