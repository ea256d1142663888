"""Fraud proofs: a true one always holds, and nothing else does."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import random
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from bittensor.sp_core import ss58_decode, ss58_encode

from mapreduce.core.dtypes import DType
from mapreduce.core.hash_tree import BlockTree, block_bytes, block_count
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.reduce import ReduceOp, reduce_reference
from mapreduce.errors import BadMessage
from mapreduce.net.auth import signer, verify_signature
from mapreduce.services.grants import sign_grant
from mapreduce.wire.proofs import (
    MAX_PROOF_BYTES,
    Claim,
    Delegation,
    Opening,
    ProofInvalid,
    ProofKind,
    Signed,
    check_claim,
    check_proof,
    encode_proof,
)
from mapreduce.wire.statements import NO_ROOT, Certificate, Receipt, Upload, session_key_statement
from test.parties import Parties, hotkey
from test.unit.test_sessions import terms

if TYPE_CHECKING:
    from bittensor.sp_core import Keypair

    from mapreduce.wire.proofs import Finding

check = functools.partial(check_proof, verify=verify_signature)
STATEMENT = operator.attrgetter("statement")
MAGIC = b"mapreduce proof 1\n"
REDUCIBLE = [
    (op, dtype)
    for op in (ReduceOp.SUM, ReduceOp.AVG)
    for dtype in DType
    if dtype.reducible and (op is ReduceOp.SUM or dtype.is_float)
]


def tree_of(data: bytes) -> BlockTree:
    tree = BlockTree()
    tree.add(memoryview(data))
    return tree


def sign(key: Keypair, statement: bytes) -> Signed:
    return Signed(statement=statement, signature=signer(key)(statement))


class Scene:
    """One segment of one step in one job: what the ranks sent, and what its miner owes them."""

    def __init__(
        self,
        seed: int,
        *,
        op: ReduceOp = ReduceOp.AVG,
        dtype: DType = DType.FLOAT32,
        nbytes: int = 2 * BLOCK_BYTES + 100,
        peers: int = 3,
        miners: int = 2,
    ) -> None:
        self.random = random.Random(seed)
        self.parties = Parties(terms(peers, miners), job=self.random.randbytes(16).hex())
        self.op, self.dtype, self.nbytes = op, dtype, nbytes
        self.step = self.random.randrange(1, 1 << 32)
        self.segment = self.random.randrange(miners)
        self.rank = self.random.randrange(peers)  # of the sender, and of whom F2 and F4 are about
        self.place = self.parties.keys.place(self.step, self.segment)
        self.miner = self.parties.miners[self.segment]
        self.inputs = [self.random.randbytes(nbytes) for _ in range(peers)]
        self.output = self.inputs[self.rank]
        if op is not ReduceOp.BROADCAST:
            arrays = [np.frombuffer(data, dtype.storage) for data in self.inputs]
            self.output = reduce_reference(arrays, dtype, op).tobytes()
        sent = [op is not ReduceOp.BROADCAST or rank == self.rank for rank in range(peers)]
        self.entries = tuple(
            (tree_of(data).root() if given else NO_ROOT, self.random.randbytes(32))
            for data, given in zip(self.inputs, sent, strict=True)
        )

    # What the parties sign; `changes` are the lies ------------------------------------------------

    def certified(self, **changes: object) -> Signed:
        said = Certificate(
            place=self.place,
            op=self.op,
            dtype=self.dtype,
            sender=self.rank if self.op is ReduceOp.BROADCAST else 0,
            nbytes=self.nbytes,
            root=tree_of(self.output).root(),
            entries=self.entries,
        )
        return sign(self.miner, dataclasses.replace(said, **changes).statement())

    def _sent(self, kind: type[Upload | Receipt], changes: dict[str, object]) -> bytes:
        root, hashed = self.entries[self.rank]
        said = {"rank": self.rank, "nbytes": self.nbytes, "root": root, "nonce_hash": hashed}
        return kind(**{"place": self.place, **said, **changes}).statement()

    def receipt(self, **changes: object) -> Signed:
        return sign(self.miner, self._sent(Receipt, changes))

    def upload(self, **changes: object) -> Signed:
        return sign(self.parties.sessions[self.rank], self._sent(Upload, changes))

    def delegation(self) -> Delegation:
        peer = self.parties.peers[self.rank].ss58_address
        return Delegation(hotkey=peer, signature=self.parties.delegation(self.rank))

    # Claims ---------------------------------------------------------------------------------------

    def wrong_sum(self, block: int, output: bytes, signed: Signed | None = None) -> Claim:
        """F1 with this output, or the claim that it is one."""
        root, begin = tree_of(output).root(), block * BLOCK_BYTES
        return Claim(
            kind=ProofKind.WRONG_SUM,
            statements=(signed or self.certified(root=root),),
            block=block,
            openings=tuple(
                Opening(data=data[begin:][:BLOCK_BYTES], path=tree_of(data).paths((block,))[0])
                for data in (*self.inputs, output)
            ),
        )

    def wrong_broadcast(self) -> Claim:
        root = tree_of(self.random.randbytes(self.nbytes)).root()
        return Claim(kind=ProofKind.WRONG_SUM, statements=(self.certified(root=root),))

    def broken_receipt(self, **changes: object) -> Claim:
        statements = (self.receipt(**changes), self.certified())
        return Claim(kind=ProofKind.BROKEN_RECEIPT, statements=statements)

    def two_certificates(self, **changes: object) -> Claim:
        both = sorted((self.certified(), self.certified(**changes)), key=STATEMENT)
        return Claim(kind=ProofKind.TWO_CERTIFICATES, statements=tuple(both))

    def two_uploads(self, delegation: Delegation | None, **changes: object) -> Claim:
        both = tuple(sorted((self.upload(), self.upload(**changes)), key=STATEMENT))
        return Claim(kind=ProofKind.TWO_UPLOADS, statements=both, delegation=delegation)

    def of_the_miner(self) -> list[Claim]:
        """One of each kind against it."""
        root = bytes(32)
        wrong = self.wrong_sum(*self.one_bit_off())
        return [wrong, self.broken_receipt(root=root), self.two_certificates(root=root)]

    def one_bit_off(self) -> tuple[int, bytes]:
        """A block, and the output with the lowest bit of one of its elements wrong."""
        element = self.random.randrange(self.nbytes // self.dtype.itemsize)
        output = bytearray(self.output)
        output[element * self.dtype.itemsize] ^= 1
        return element * self.dtype.itemsize // BLOCK_BYTES, bytes(output)

    def proof(self, claim: Claim) -> bytes:
        signed = self.parties.signed
        return encode_proof(signed.grant, signed.signature, claim)


def proves(scene: Scene, claim: Claim) -> Finding:
    """What the claim proves, after a check of all that the scene knows of it."""
    grant, finding = check(scene.proof(claim))
    assert grant == scene.parties.grant
    assert finding.kind is claim.kind
    assert (finding.step, finding.segment) == (scene.step, scene.segment)
    if claim.kind is ProofKind.TWO_UPLOADS:
        key = scene.parties.peers if claim.delegation else scene.parties.sessions
        assert (finding.uid, finding.rank) == (None, scene.rank)
        assert finding.culprit == key[scene.rank].ss58_address
    else:
        assert (finding.uid, finding.rank) == (10 + scene.segment, None)
        assert finding.culprit == scene.miner.ss58_address
    assert finding.culprit in finding.lines[0]
    assert check_claim(claim, scene.parties.keys) == finding
    return finding


def proves_nothing(scene: Scene, claim: Claim, reason: str) -> None:
    with pytest.raises(ProofInvalid, match=reason):
        check(scene.proof(claim))


# True proofs --------------------------------------------------------------------------------------


def test_one_element_one_ulp_off_is_proven_in_each_block() -> None:
    scene = Scene(1, nbytes=4 * BLOCK_BYTES + 12)
    tensors = [np.random.default_rng(rank).random(scene.nbytes // 4, "f4") for rank in range(3)]
    scene.inputs = [tensor.tobytes() for tensor in tensors]
    scene.entries = tuple((tree_of(data).root(), bytes(32)) for data in scene.inputs)
    honest = reduce_reference(tensors, DType.FLOAT32, ReduceOp.AVG)
    for block, element in enumerate((0, 4096 + 5, 3 * 4096 - 1, 3 * 4096, 4 * 4096 + 2)):
        lie = honest.copy()
        lie[element] = np.nextafter(lie[element], np.float32(2))
        what = proves(scene, scene.wrong_sum(block, lie.tobytes())).what
        assert f"1 of {block_bytes(scene.nbytes, block) // 4} elements of block {block}" in what
        assert f"bytes {4 * element} to {4 * element + 3}" in what
        assert lie[element].tobytes().hex() in what
        assert honest[element].tobytes().hex() in what


def test_a_bfloat16_sum_is_proven_wrong() -> None:
    scene = Scene(2, op=ReduceOp.SUM, dtype=DType.BFLOAT16, nbytes=BLOCK_BYTES + 2)
    assert "the sum of the bfloat16" in proves(scene, scene.wrong_sum(*scene.one_bit_off())).what


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BOOL])
def test_a_broadcast_of_other_bytes_is_proven_without_them(dtype: DType) -> None:
    scene = Scene(3, op=ReduceOp.BROADCAST, dtype=dtype)
    claim = scene.wrong_broadcast()
    assert len(scene.proof(claim)) < 4096
    proves(scene, claim)


def test_a_receipt_that_the_certificate_does_not_keep_is_proven() -> None:
    scene = Scene(4)
    root = tree_of(b"other").root()
    assert root.hex() in proves(scene, scene.broken_receipt(root=root)).what
    proves(scene, scene.broken_receipt(nonce_hash=bytes(32)))
    proves(scene, scene.broken_receipt(nbytes=scene.nbytes + 4))


def test_two_certificates_for_one_segment_are_proven() -> None:
    scene = Scene(5)
    root = tree_of(b"other").root()
    assert root.hex() in proves(scene, scene.two_certificates(root=root)).what
    other = (scene.entries[1], scene.entries[0], scene.entries[2])
    assert "different inputs" in proves(scene, scene.two_certificates(entries=other)).what


@pytest.mark.parametrize("delegated", [False, True])
def test_two_uploads_for_one_segment_are_proven(delegated: bool) -> None:
    scene = Scene(6)
    given = scene.delegation() if delegated else None
    finding = proves(scene, scene.two_uploads(given, root=bytes(range(32))))
    name = "hotkey" if delegated else "session key"
    assert finding.lines[0] == f"rank {scene.rank + 1}, {name} {finding.culprit}"


@dataclass(frozen=True, slots=True)
class Lie:
    scene: Scene
    claim: Claim
    data: bytes


def random_lie(seed: int) -> Lie:
    """A true proof. Each is of a job of its own, and all kinds come in turn."""
    rng = random.Random(f"lie {seed}")
    op, dtype = rng.choice(REDUCIBLE)
    if broadcast := seed % 8 == 4:
        op, dtype = ReduceOp.BROADCAST, rng.choice(list(DType))
    nbytes = rng.randint(1, 5 * BLOCK_BYTES // dtype.itemsize) * dtype.itemsize
    if rng.random() < 0.3:
        nbytes = rng.randint(1, 5) * BLOCK_BYTES
    peers, miners = rng.randint(1, 5), rng.randint(1, 4)
    scene = Scene(seed, op=op, dtype=dtype, nbytes=nbytes, peers=peers, miners=miners)
    change = rng.choice(("root", "nonce_hash"))
    match seed % 4:
        case 0:
            lied = scene.one_bit_off()
            claim = scene.wrong_broadcast() if broadcast else scene.wrong_sum(*lied)
        case 1:
            claim = scene.broken_receipt(**{change: rng.randbytes(32)})
        case 2:
            claim = scene.two_certificates(root=rng.randbytes(32))
        case _:
            given = scene.delegation() if rng.random() < 0.5 else None
            claim = scene.two_uploads(given, **{change: rng.randbytes(32)})
    return Lie(scene, claim, scene.proof(claim))


def test_every_true_proof_is_accepted() -> None:
    for lie in map(random_lie, range(64)):
        proves(lie.scene, lie.claim)


# Claims that prove nothing ------------------------------------------------------------------------


def test_an_honest_step_proves_nothing() -> None:
    scene = Scene(7)
    for block in range(3):
        right = f"block {block} is the avg of its inputs"
        proves_nothing(scene, scene.wrong_sum(block, scene.output), right)
    proves_nothing(scene, scene.broken_receipt(), "says what the receipt says")
    proves_nothing(scene, scene.two_certificates(), "not different")  # but signed twice
    proves_nothing(scene, scene.two_uploads(scene.delegation()), "not different")
    scene = Scene(7, op=ReduceOp.BROADCAST)
    claim = Claim(kind=ProofKind.WRONG_SUM, statements=(scene.certified(),))
    proves_nothing(scene, claim, "contradicts nothing")


def test_a_wrong_sum_is_only_proven_with_the_certified_blocks() -> None:
    scene = Scene(8)
    block, output = scene.one_bit_off()
    honest = (block + 1) % 3
    proves_nothing(scene, scene.wrong_sum(honest, output), f"block {honest} is the avg")
    invented = scene.wrong_sum(block, output, scene.certified())
    proves_nothing(scene, invented, "the block of the output is none")
    scene.inputs[1] = bytes(scene.nbytes)
    proves_nothing(scene, scene.wrong_sum(block, output), "the block of rank 2 is none")
    few = scene.certified(entries=scene.entries[:2])
    scene.inputs.pop()
    proves_nothing(scene, scene.wrong_sum(block, output, few), "a certificate of 2 ranks")


def test_only_what_the_accused_has_signed_counts() -> None:
    scene = Scene(9)
    miner, parties, change = scene.miner, scene.parties, {"root": bytes(32)}
    others = [key for key in parties.miners if key is not miner]
    for key in (*others, *parties.peers, *parties.sessions, parties.validator, hotkey("stranger")):
        scene.miner = key
        for claim in scene.of_the_miner():
            proves_nothing(scene, claim, "not signed by miner uid")
    sessions = [key for key in parties.sessions if key is not parties.sessions[scene.rank]]
    for key in (*sessions, parties.peers[scene.rank], miner, parties.validator):
        parties.sessions[scene.rank] = key
        proves_nothing(scene, scene.two_uploads(None, **change), "an upload is not signed by rank")


def test_a_grant_needs_the_signature_of_the_validator_it_names() -> None:
    scene = Scene(10)
    scene.parties.signed = sign_grant(hotkey("stranger"), scene.parties.grant)
    named = scene.parties.validator.ss58_address
    proves_nothing(scene, scene.two_certificates(root=bytes(32)), f"not signed by {named}")


def test_statements_of_another_place_do_not_count() -> None:
    scene, other = Scene(11), Scene(12)
    place, change = scene.place, {"root": bytes(32)}
    for elsewhere in (other.place, dataclasses.replace(place, segment=2)):
        scene.place = elsewhere
        for claim in scene.of_the_miner():
            proves_nothing(scene, claim, "a statement is of another job")
        proves_nothing(scene, scene.two_uploads(None, **change), "different places|does not have")
    scene.place = place
    for field in ("step", "epoch"):
        change["place"] = dataclasses.replace(place, **{field: scene.step - 1})
        proves_nothing(scene, scene.broken_receipt(**change), "different places")
        proves_nothing(scene, scene.two_certificates(**change), "different places")
        proves_nothing(scene, scene.two_uploads(None, **change), "different places")
    proves_nothing(scene, scene.two_uploads(None, rank=(scene.rank + 1) % 3), "different places")
    proves_nothing(scene, scene.broken_receipt(rank=3), "different places")


def test_a_delegation_is_for_one_session_key_and_validator() -> None:
    scene = Scene(13)
    peer, key = scene.parties.peers[scene.rank], scene.parties.sessions[scene.rank].ss58_address
    stranger = hotkey("stranger")
    for validator, signs in ((stranger, peer), (scene.parties.validator, stranger)):
        signed = signer(signs)(session_key_statement(validator.ss58_address, key))
        given = dataclasses.replace(scene.delegation(), signature=signed)
        proves_nothing(scene, scene.two_uploads(given, root=bytes(32)), "has not signed for this")


def test_a_delegation_has_one_spelling() -> None:
    scene = Scene(14)
    address = ss58_encode(ss58_decode(scene.delegation().hotkey), 0)
    given = dataclasses.replace(scene.delegation(), hotkey=address)
    proves_nothing(scene, scene.two_uploads(given, root=bytes(32)), "has not signed for this")


def test_a_proof_that_is_too_long_is_refused() -> None:
    with pytest.raises(ProofInvalid, match=f"at most {MAX_PROOF_BYTES} bytes"):
        check(random_lie(1).data.ljust(MAX_PROOF_BYTES + 1))
    with pytest.raises(ProofInvalid, match="bytes follow its end"):
        check(random_lie(1).data.ljust(MAX_PROOF_BYTES))


def test_a_length_that_is_not_there_allocates_nothing() -> None:
    lie = random_lie(3)
    places = places_of(lie)
    for at in (places[1], places[5], places[8]):  # of the grant and of both statements
        data = lie.data[:at] + b"\xff" * 4 + lie.data[at + 4 :]
        tracemalloc.start()
        with pytest.raises(ProofInvalid, match=f"a part of {(1 << 32) - 1} bytes"):
            check(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


# Mutations: trust.md, A7 --------------------------------------------------------------------------


def places_of(lie: Lie) -> list[int]:
    """Where the parts of a proof begin, and its end: positions are chosen by part, since nearly all
    bytes are those of blocks."""
    ends = [len(MAGIC), 4, len(lie.scene.parties.signed.grant), 64, 1]
    for signed in lie.claim.statements:
        ends += [4, len(signed.statement), 64]
    if lie.claim.kind is ProofKind.WRONG_SUM:
        ends.append(8)
    for opening in lie.claim.openings:
        ends += [len(opening.data), len(opening.path)]
    return [*itertools.accumulate(ends, initial=0), len(lie.data)]


def position(rng: random.Random, lie: Lie) -> int:
    parts = [part for part in itertools.pairwise(places_of(lie)) if part[0] < part[1]]
    return rng.randrange(*rng.choice(parts))


def mutate(rng: random.Random, lie: Lie, other: Lie) -> bytes:
    """One change of the proof; it may come out as it was."""
    data = bytearray(lie.data)
    at = position(rng, lie)
    match rng.choice(("bit", "bytes", "cut", "more", "swap", "delete", "repeat", "part", "claim")):
        case "bit":
            data[at] ^= 1 << rng.randrange(8)
        case "bytes":
            size = min(rng.randint(1, 8), len(data) - at)
            data[at : at + size] = rng.randbytes(size)
        case "cut":
            del data[at:]
        case "more":
            data += rng.choice((bytes(1), rng.randbytes(rng.randint(1, 99)), lie.data))
        case "swap":
            first, second = sorted((at, position(rng, lie)))
            size = rng.randint(1, max(1, min(second - first, len(data) - second, 64)))
            one, two = slice(first, first + size), slice(second, second + size)
            data[one], data[two] = data[two], data[one]
        case "delete":
            del data[at : at + rng.choice((1, 2, 4, 32, 64, 100))]
        case "repeat":
            size = rng.choice((1, 2, 4, 32, 64, 100))
            data[at:at] = data[at : at + size]
        case "part":  # of this or another proof, in the place of one of this
            mine, theirs = places_of(lie), places_of(other)
            here, there = rng.randrange(len(mine) - 1), rng.randrange(len(theirs) - 1)
            data[mine[here] : mine[here + 1]] = other.data[theirs[there] : theirs[there + 1]]
        case _:
            return mutate_claim(rng, lie, other)
    return bytes(data)


def mutate_claim(rng: random.Random, lie: Lie, other: Lie) -> bytes:
    """A change that leaves a proof readable."""
    claim = lie.claim
    match rng.choice(("kind", "job", "order", "opening", "block", "key")):
        case "kind":
            claim = dataclasses.replace(claim, kind=ProofKind(rng.randint(1, 4)))
        case "job":
            return other.scene.proof(claim)
        case "order":
            claim = dataclasses.replace(claim, statements=claim.statements[::-1])
        case "opening" if claim.openings:
            openings = list(claim.openings)
            first, second = rng.sample(range(len(openings)), 2)
            openings[first], openings[second] = openings[second], openings[first]
            claim = dataclasses.replace(claim, openings=tuple(openings))
        case "block" if claim.kind is ProofKind.WRONG_SUM:
            near = rng.randrange(block_count(lie.scene.nbytes) + 1)
            claim = dataclasses.replace(claim, block=rng.choice((near, rng.getrandbits(64))))
        case "key" if claim.delegation:
            given = dataclasses.replace(claim.delegation, hotkey=hotkey("stranger").ss58_address)
            claim = dataclasses.replace(claim, delegation=given)
    return lie.scene.proof(claim)


def check_mutations(count: int, lie_count: int) -> None:
    lies = [random_lie(seed) for seed in range(lie_count)]
    for seed in range(count):
        rng = random.Random(f"mutation {seed}")
        lie, other = rng.choice(lies), rng.choice(lies)
        while (data := mutate(rng, lie, other)) == lie.data:
            pass
        try:
            check(data)
        except BadMessage:  # ProofInvalid is one; anything else fails the test
            continue
        at = next((n for n, old in enumerate(lie.data) if data[n : n + 1] != bytes([old])), -1)
        raise AssertionError(f"mutation {seed} of {lie.claim.kind.label} holds; differs at {at}")


def test_no_mutation_of_a_proof_is_accepted() -> None:
    check_mutations(1_000, 24)


@pytest.mark.slow
def test_no_mutation_of_many_proofs_is_accepted() -> None:
    check_mutations(10_000, 96)
