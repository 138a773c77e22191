"""One head: all that is taken of the logits of a projection becomes one op.

Patterns name what is taken of a row of logits, a `Taken`: cross-entropy, log-probability, entropy,
log-sum-exp, a divergence from a second head. `join` finds everything that is taken of one
projection, follows it to the sum in which it ends, and makes one match of it:

- Where the sum takes each token's values times coefficients that are known before the projection
  runs (`_sums`), the match ends in the sum: ``liger_fx::linear_loss``, whose forward computes the
  gradients. Chunks of one hidden state, as torchtune's losses project them, become the whole.
- Else it ends in the values of each token: ``liger_fx::linear_token_losses``, whose backward
  projects again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from liger_fx.passes._chunks import whole_of
from liger_fx.passes._rows import (
    head_arguments,
    kept_rows,
    logits_of,
    slices,
    temperature,
)
from liger_fx.passes._sums import (
    Number,
    Sizes,
    Step,
    Transpose,
    dims_of,
    is_tensor,
    readers,
    times,
    walk,
)
from torch import fx

from liger_fx import ops
from liger_fx.canonical import View, fake, op_name, same_sizes, specialise
from liger_fx.effects import without_grad
from liger_fx.matcher import Match, Matcher, Reject, candidates, interior
from liger_fx.pattern import Pattern, traced
from liger_fx.rewrite import Rewrite

_OPS = ("linear_loss", "linear_token_losses", "linear_loss_kernel")
_HIDDEN = ("hidden", "teacher_hidden")  # cut into chunks with the labels; all else is common


@dataclass(frozen=True)
class Taken:
    """What a pattern takes of each row of logits: ``sign`` times ``name``, one of what
    `liger_fx.ops.token_loss` computes. check: raises `Reject` for what the op does not compute.
    beta: of a Jensen-Shannon divergence."""

    pattern: Callable[..., Any]
    name: str
    check: Callable[[Match], None]
    sign: float = 1.0
    beta: Callable[[Match], float] = lambda match: 0.5


@dataclass(eq=False)
class Term:
    """A value and the steps that follow it, first those that end in a value of each token."""

    taken: Taken
    match: Match
    inner: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    read: list[fx.Node] = field(default_factory=list)  # for its number alone, without a gradient

    @property
    def path(self) -> list[fx.Node]:
        """The nodes from the start to the end."""
        return [self.start, *(step.node for step in self.steps)]

    @property
    def root(self) -> fx.Node:
        return self.match.root

    @property
    def start(self) -> fx.Node:
        """The first node without a dimension of classes."""
        return self.inner[-1].node if self.inner else self.root

    @property
    def has_teacher(self) -> bool:
        return "teacher_rows" in self.match.sources

    @property
    def has_classes(self) -> bool:
        return self.match.bindings.get("kl_reduction") == "none"

    @property
    def tokens(self) -> torch.Tensor:
        """A fake tensor of the shape of the tokens: the kept logits', without the classes."""
        return kept_rows(self.match)[..., 0]


@dataclass(eq=False)
class Head(Match):
    """All that is taken of one projection, in ``chunks`` of terms. ``summed``: the first output is
    the sum of everything; the others, or all without it, are values of single tokens."""

    chunks: list[list[Term]] = field(default_factory=list)
    summed: bool = False
    every_value: bool = False
    along: int = 0  # the dimension of the chunks

    @property
    def terms(self) -> list[Term]:
        return self.chunks[0]

    @property
    def first(self) -> fx.Node:
        """The node before which the op stands: the first of the outputs, or the first one at which
        all is known that the op reads, if that is before any output is used."""
        first = min(self.outputs)
        read = [value for value in self.bindings.values() if isinstance(value, fx.Node)]
        if all(node < first for node in read):
            return first
        users = {user for node in self.outputs for user in node.users}
        last = min(users - self.nodes, default=first)
        off = without_grad(self.view.graph) - {*self.outputs}
        at = max(read).next
        while at < last and (at in off or at.target is torch._C._set_grad_enabled):
            at = at.next
        return min(at, last)

    @property
    def spelling(self) -> str:
        return ", ".join(term.match.pattern.name for term in self.terms)

    @functools.cached_property
    def sizes(self) -> Sizes:
        return _sizes(self.bindings, self.terms[0].match)


def head_rewrite(
    name: str,
    leading: Sequence[Taken],
    beside: Sequence[Taken],
    always: bool = False,
    **rest: Any,
) -> Rewrite:
    """A rewrite that makes the op where one of ``leading`` is taken of a projection, and with it
    what else is, of ``leading`` and ``beside``. always: even where the op saves nothing."""
    known = {taken.pattern.__name__: taken for taken in (*leading, *beside)}

    def check(match: Match) -> None:
        if not isinstance(match, Head):
            known[match.pattern.name].check(match)
        elif not always:
            _check_gain(match)

    return Rewrite(
        name=name,
        patterns=[taken.pattern for taken in leading],
        check=check,
        join=functools.partial(join, known),
        replace=replace,
        constants=["teacher_hidden", "teacher_weight", "teacher_bias"],
        saved=_saved,
        settings={"chunk_tokens": 0, "accum_dtype": torch.float32, "skip_ignored": True},
        gain="the logits never exist",
        save_ops=[f"liger_fx::{op}" for op in _OPS],
        **rest,
    )


def _check_gain(head: Head) -> None:
    """Raise `Reject` where all logits fit one chunk, and no gradient needs them."""
    lead = max(head.terms, key=lambda term: term.has_teacher)
    heads = [logits_of(lead.match, prefix) for prefix in ("", "teacher_")[: 1 + lead.has_teacher]]
    tokens = math.prod(lead.tokens.shape) * len(head.chunks)
    few = isinstance(tokens, int) and ops.fits_one_chunk(
        tokens,
        heads[0].shape[-1],
        sum(logits.element_size() for logits in heads),
        heads[0].device.type,
        head.settings["chunk_tokens"],
    )
    if few and not heads[0].requires_grad:
        raise Reject("no gradient is needed and the logits fit one chunk: nothing would be saved")


def _saved(match: Match) -> list[str]:
    """The op of a sum computes its gradients in the forward and keeps nothing else."""
    return [] if isinstance(match, Head) and match.summed else list(match.bindings)


# -- joining ---------------------------------------------------------------------------------------


def join(
    known: Mapping[str, Taken],
    view: View,
    matches: list[Match],
    reject: Callable[[fx.Node, str], None],
) -> list[Match]:
    """Heads of the ``matches``, which are of leading values, by projection."""
    if not matches:
        return []
    found = {match.root: match for match in matches}
    for match in _beside(view, known.values(), matches[0]):
        found.setdefault(match.root, match)
    values = [match for match in found.values() if not _inside(match, found.values())]
    heads: list[list[Term]] = []
    for projection in dict.fromkeys(match.sources["rows"] for match in matches):
        of_it = [match for match in values if match.sources["rows"] is projection]
        try:
            heads.append(_terms(view, known, of_it))
        except Reject as reason:
            reject(of_it[0].root, str(reason))
    return [*_merged(view, heads)]


def _beside(view: View, takes: Iterable[Taken], like: Match) -> Iterable[Match]:
    for taken in takes:
        pattern: Pattern = traced(taken.pattern)
        for node in candidates(view, pattern):
            match = Matcher(view, pattern).at(node)
            if match is not None:
                match.settings, match.recomputed = like.settings, like.recomputed
                yield match


def _inside(match: Match, others: Iterable[Match]) -> bool:
    """Is the value only on the way to another one?"""
    return any(
        match.root in other.nodes - {other.root} and other.nodes.issuperset(match.root.users)
        for other in others
    )


def _terms(view: View, known: Mapping[str, Taken], matches: list[Match]) -> list[Term]:
    """All that is taken of one projection. Raises `Reject` where one op cannot compute it."""
    matches = sorted(matches, key=lambda match: view.position[match.root])
    terms = [Term(known[match.pattern.name], match) for match in matches]
    order = [*ops.TAKES, *ops.DIVERGENCES]
    terms.sort(key=lambda term: order.index(term.taken.name))
    for term in terms:
        term.taken.check(term.match)
    _check_together(terms)
    taken = set().union(*(match.nodes for match in matches))
    for term in terms:
        _follow(view, term, taken)
    return terms


def _check_together(terms: list[Term]) -> None:
    names = [term.taken.name for term in terms]
    first = terms[0].match
    if len({*names}) < len(names):
        raise Reject(f"{_named(terms)} are taken of one projection; the op gives one of each")
    if {*names} & {*ops.DIVERGENCES} and {*names} & {*ops.TAKES[1:]}:
        raise Reject(f"{_named(terms)} are taken of one projection; no kernel gives them all")
    divergences = [term.match for term in terms if term.has_teacher]
    tempered = divergences or [first]
    for term in terms:
        match = term.match
        if slices(match) != slices(first):
            raise Reject(f"the {_named(terms)} are of different rows of the logits")
        if match.bindings.get("softcap") is not first.bindings.get("softcap"):
            raise Reject(f"the {_named(terms)} are of logits with different softcaps")
        if divergences and not term.has_teacher:
            _check_student(match)
        elif match is not tempered[0] and temperature(match) != temperature(tempered[0]):
            raise Reject(f"the {_named(terms)} have different temperatures")
    teachers = {match.sources["teacher_rows"] for match in divergences}
    kept = [slices(match, "teacher_rows") for match in divergences]
    if len(teachers) > 1 or any(rows != kept[0] for rows in kept):
        raise Reject("the divergences are from two teachers; the kernel has one")


def _check_student(match: Match) -> None:
    """Of the cross-entropy beside a divergence."""
    values = match.values
    if values["class_weight"] is not None or values["label_smoothing"] or "softcap" in values:
        raise Reject(
            "the cross-entropy beside a divergence has class weights, label smoothing or a softcap; "
            "the kernel has not"
        )


def _named(terms: list[Term]) -> str:
    return " and ".join(term.taken.name for term in terms)


def _follow(view: View, term: Term, taken: set[fx.Node]) -> None:
    """Find the steps after a value. Raises `Reject` for classes that are not added up."""
    sizes = _sizes(term.match.bindings, term.match)
    steps = list(walk(view, term.root, sizes, term.has_classes, taken))
    if not term.has_classes:
        term.steps = steps
        return
    at = next((i for i, step in enumerate(steps, 1) if step.op in ("sum", "mean")), None)
    if at is None or any(readers(step.source) for step in steps[:at]):
        raise Reject(
            "the divergences of single classes leave the graph, or are added up by more than sum(), "
            "mean(), masks and weights of tokens; jsd[mask] ends the graph, jsd * mask does not"
        )
    term.inner, term.steps = steps[:at], steps[at:]


def _sizes(bindings: Mapping[str, Any], match: Match) -> Sizes:
    logits = kept_rows(match)
    values = {name: fake(value) for name, value in bindings.items()}
    return Sizes(values, math.prod(logits.shape[:-1]), logits.shape[-1])


# -- where a head ends -----------------------------------------------------------------------------


def _merged(view: View, heads: list[list[Term]]) -> Iterable[Match]:
    """A match for each projection, and one for all chunks of a hidden state that are summed."""
    left = {id(terms): terms for terms in heads}
    for chunks in _families(view, heads):
        whole = _summed(view, chunks)
        if whole is not None:
            for terms in chunks:
                del left[id(terms)]
            yield whole
    for terms in left.values():
        yield _summed(view, [terms]) or _apart(view, terms)


def _families(view: View, heads: list[list[Term]]) -> Iterable[list[list[Term]]]:
    """Projections that differ in the chunk of a hidden state, by the tensor that was cut."""
    families: dict[Any, list[list[Term]]] = {}
    for terms in heads:
        hidden = terms[0].match.bindings["hidden"]
        if isinstance(hidden, fx.Node) and op_name(hidden) == "getitem":
            families.setdefault(hidden.args[0], []).append(terms)
    for family in families.values():
        if len(family) > 1 and _are_chunks(view, family):
            yield family


def _are_chunks(view: View, family: list[list[Term]]) -> bool:
    first = family[0]
    for terms in family:
        if [t.taken for t in terms] != [t.taken for t in first]:
            return False
        for term, like in zip(terms, first, strict=True):
            passed = [node for nodes in term.match.chains.values() for node in nodes]
            if any(op_name(node) not in ("cast", "reshape", "detach") for node in passed):
                return False  # slices of the rows of one chunk are not slices of the whole
            for name in like.match.bindings.keys() - {*_HIDDEN, "target", "label"}:
                if not view.same(like.match.bindings[name], term.match.bindings[name]):
                    return False
    return _whole(view, family, "hidden") is not None


def _whole(view: View, chunks: list[list[Term]], name: str) -> Any:
    """What was cut, of which the chunks have the parts ``name``, and the dimension."""
    parts = [
        next((t.match.bindings[name] for t in terms if name in t.match.bindings), None)
        for terms in chunks
    ]
    return None if None in parts else whole_of(view, parts)


def _summed(view: View, chunks: list[list[Term]]) -> Head | None:
    """The match of the sum in which all chunks of all terms end; None if there is none, or if not
    all that it needs is known where the match stands."""
    terms = [term for chunk in chunks for term in chunk]
    with_gradient = [term for term in terms if fake(term.root).requires_grad]
    adding = with_gradient or terms
    ends = [_end(term) for term in adding]
    if None in ends or (len(chunks) > 1 and len(adding) < len(terms)):
        return None
    end = ends[0] if len(adding) == 1 else _meeting(adding)
    if end is None:
        return None
    for term in terms:
        term.steps = term.steps[: term.path.index(end)] if end in term.path else []
    return _head(view, chunks, adding, end)


def _end(term: Term) -> fx.Node | None:
    """The first scalar."""
    return next((node for node in term.path if not fake(node).dim()), None)


def _meeting(terms: list[Term]) -> fx.Node | None:
    """The first node to which all terms lead."""
    first, *others = [{*term.path} for term in terms]
    common = first.intersection(*others)
    return min(common) if common else None


def _head(view: View, chunks: list[list[Term]], adding: list[Term], end: fx.Node) -> Head | None:
    terms = [term for chunk in chunks for term in chunk]
    outputs = [end]
    for term in terms:
        term.read = (
            []
            if term.start is end
            else [term.start]
            if term not in adding
            else [node for node in term.path if node is not end and readers(node)]
        )
        outputs += (node for node in term.read if node not in outputs)
    if len(outputs) > 1 and (
        len(chunks) > 1 or any(step.in_place for term in adding for step in term.steps)
    ):
        return None
    own = {node for term in terms for node in term.path}
    steps = [step for term in terms for step in (*term.inner, *term.steps)]
    if any(step.in_place and step.written not in {step.source, *own} for step in steps):
        return None  # somebody else's number is added to
    operands = {other for step in steps for other in step.others} - own
    head = _joined(view, chunks, outputs, operands)
    if head is None or any(not operand < head.first for operand in operands):
        return None
    head.summed = True
    head.every_value = any(_is_read_unweighted(term) for term in terms)
    return head


def _is_read_unweighted(term: Term) -> bool:
    """Is a value read that a later step, or no step, weighs?"""
    if not term.read:
        return False
    at = term.path.index(term.read[0])
    return not term.steps or any(step.weighs_tokens for step in term.steps[at:])


def _apart(view: View, terms: list[Term]) -> Match:
    """The match of the values of each token."""
    for term in terms:
        term.steps = []
    outputs = [term.start for term in terms]
    operands = {other for term in terms for step in term.inner for other in step.others}
    head = _joined(view, [terms], outputs, operands)
    assert head is not None, "one projection is no chunk"
    return head


def _joined(
    view: View, chunks: list[list[Term]], outputs: list[fx.Node], operands: set[fx.Node]
) -> Head | None:
    lead = chunks[0][0].match
    bindings: dict[str, Any] = {}
    for i, terms in enumerate(chunks):
        for term in terms:
            for name, value in term.match.bindings.items():
                if bindings.setdefault(name, value) is not value and name not in _HIDDEN:
                    bindings[_key(name, i, term)] = value
    along = 0
    if len(chunks) > 1:
        cut = {name: _whole(view, chunks, name) for name in _HIDDEN if name in bindings}
        if None in cut.values() or len({chunk[1:] for chunk in cut.values()}) > 1:
            return None
        bindings |= {name: chunk.whole for name, chunk in cut.items()}
        along = cut["hidden"].dim
    bindings |= {_operand_name(node): node for node in operands}
    nodes = set().union(*(interior(view, node, bindings) for node in outputs))
    return Head(
        view, lead.pattern, tuple(outputs), bindings, lead.chains, lead.sources, nodes,
        lead.settings, recomputed=lead.recomputed, chunks=chunks, along=along,
    )  # fmt: skip


def _key(name: str, chunk: int, term: Term) -> str:
    return f"{name}[{chunk}, {term.taken.name}]"


def _operand_name(node: fx.Node) -> str:
    return f"weight {node.name}"


# -- replacing -------------------------------------------------------------------------------------


def replace(head: Head, **proxies: Any) -> Any:
    return _Replacement(head, proxies).record()


class _Replacement:
    """Records a head. proxies: of its bindings."""

    def __init__(self, head: Head, proxies: dict[str, Any]) -> None:
        self.head, self.proxies = head, proxies
        self.by_node = {
            value: proxies[name]
            for name, value in head.bindings.items()
            if isinstance(value, fx.Node)
        }
        self.lead = head.terms[0].match
        self.hidden = proxies["hidden"]
        self.transpose = Transpose(head.sizes, proxies, self.operand)

    def operand(self, node: fx.Node) -> Any:
        value = self.head.view.resolve(node)
        return self.by_node[value] if isinstance(value, fx.Node) else value

    def record(self) -> Any:
        head = self.head
        if not head.summed:
            node = _mask_of_users(head)
            mask = None if node is None else fx.Proxy(node, self.hidden.tracer)
            values = ops.linear_token_losses(*self.tensors(), mask, *self.literals())
            made = [self.read(term, values[i]) for i, term in enumerate(head.terms)]
        else:
            weights = self.weights()
            made = ops.linear_loss(*self.tensors(), weights, *self.literals(), head.every_value)
            total = made[0]
            if weights is None:
                total = self._of_values(head.terms[0], self._steps(head.terms[0]), total)
            made = [self.with_the_rest(total), *self.reads(made)]
        return tuple(
            value if fake(node).dtype == torch.float32 else value.to(fake(node).dtype)
            for value, node in zip(made, head.outputs, strict=True)
        )

    # -- arguments

    def tensors(self) -> tuple[Any, ...]:
        student = head_arguments(self.lead, self.hidden, self.proxies["weight"], self.bias(""))
        teacher: tuple[Any, ...] = (None, None, None)
        divergence = self._of("teacher_hidden")
        if divergence is not None:
            hidden, weight = (self.proxies[f"teacher_{name}"] for name in ("hidden", "weight"))
            bias = self.bias("teacher_")
            teacher = head_arguments(divergence.match, hidden, weight, bias, "teacher_")
        return *student, self.target(), self.class_weight(), *teacher

    def bias(self, prefix: str) -> Any:
        return self.proxies.get(f"{prefix}bias")

    def _of(self, name: str, chunk: int = 0) -> Term | None:
        """The term with a binding of this name."""
        return next((t for t in self.head.chunks[chunk] if name in t.match.bindings), None)

    def target(self) -> Any:
        parts = [self._labels(i) for i in range(len(self.head.chunks))]
        return parts[0] if len(parts) == 1 else self.cat(parts)

    def _labels(self, chunk: int) -> Any:
        for name in ("target", "label"):
            term = self._of(name, chunk)
            if term is not None:
                return self.by_node[term.match.bindings[name]]
        return None

    def cat(self, parts: list[Any]) -> Any:
        """Of the chunks, in any shapes of their tokens, the whole, flat."""
        if parts[0] is None:
            return None
        shape = fake(self.hidden.node).shape[:-1]
        leading = [*self.transpose.shape(shape)]
        leading[self.head.along] = -1
        return torch.cat([p.reshape(leading) for p in parts], self.head.along).reshape(-1)

    def class_weight(self) -> Any:
        term = self._of("class_weight")
        if term is None or term.match.bindings["class_weight"] is None:
            return None
        weight = self.by_node[term.match.bindings["class_weight"]]
        narrow = term.match.values["class_weight"].dtype != torch.float32
        return weight.float() if narrow else weight

    def literals(self) -> tuple[Any, ...]:
        labelled = self._of("ignore_index")
        values = {} if labelled is None else labelled.match.values
        divergence = self._of("teacher_hidden")
        tempered = divergence or self.head.terms[0]
        return (
            [term.taken.name for term in self.head.terms],
            values.get("ignore_index"),
            float(values.get("label_smoothing", 0.0)),
            specialise(values.get("softcap", 0.0)),
            temperature(tempered.match),
            0.5 if divergence is None else divergence.taken.beta(divergence.match),
            *(self.head.settings[name] for name in ("chunk_tokens", "accum_dtype", "skip_ignored")),
        )

    # -- coefficients

    def weights(self) -> Any:
        """[takes, N] or [takes, 1]; None where one value of all tokens counts alike."""
        every = [self._steps(term) for terms in self.head.chunks for term in terms]
        if len(every) == 1 and not any(step.weighs_tokens for step in every[0]):
            return None
        each = [self.weight_of(i) for i in range(len(self.head.terms))]
        if len(each) == 1 and isinstance(each[0], float) and each[0] == 1.0:
            return None
        tokens = next((c for c in each if dims_of(c)), None)
        return torch.stack([self._row(number, tokens) for number in each])

    def _steps(self, term: Term) -> list[Step]:
        return [*term.inner, *term.steps]

    def _row(self, number: Number, tokens: Any) -> Any:
        if dims_of(number):
            return number.float()
        row = (
            number.float().reshape(1)
            if is_tensor(number)
            else self.hidden.new_full((1,), number, dtype=torch.float32)
        )
        return row if tokens is None else row.expand_as(tokens)

    def weight_of(self, i: int) -> Number:
        """What the sum takes the values of a term times: a number, or for each token."""
        parts = [self._coefficient(terms[i]) for terms in self.head.chunks]
        if len(parts) == 1 or all(isinstance(p, float) and p == parts[0] for p in parts):
            return parts[0]
        pairs = zip(parts, self.head.chunks, strict=True)
        return self.cat([self._full(number, terms[i]) for number, terms in pairs])

    def _full(self, number: Number, term: Term) -> Any:
        if dims_of(number):
            return number
        shape = self.transpose.shape(term.tokens.shape)
        if not is_tensor(number):
            return self.hidden.new_full(shape, number, dtype=torch.float32)
        return number.float().expand(shape)

    def _coefficient(self, term: Term) -> Number:
        if not term.steps and term.start is not self.head.outputs[0]:
            return 0.0  # a value without gradient
        return self._of_values(term, self._steps(term))

    def _of_values(self, term: Term, steps: list[Step], number: Number = 1.0) -> Number:
        """The transpose of ``steps`` and of what the model reduces by itself, of ``number``; flat
        if of tokens."""
        number = self.transpose.coefficient(steps, term.has_classes, number)
        if dims_of(number):
            shape = list(fake(term.root).shape)
            if term.has_classes:
                shape[-1] = 1
            number = number.expand(self.transpose.shape(shape)).reshape(-1)
        number = self._reduced(term, number)
        return number if term.taken.sign == 1.0 else -number

    def _reduced(self, term: Term, number: Number) -> Number:
        match = term.match
        reduction = match.bindings.get("reduction", match.bindings.get("kl_reduction"))
        if reduction == "batchmean":
            return number / self.transpose.size(kept_rows(match).shape[0])
        if reduction == "mean" and "kl_reduction" in match.bindings:
            return number / self.transpose.size(kept_rows(match).numel())
        if reduction == "mean":
            return number / self._denominator(match)
        return number

    def _denominator(self, match: Match) -> Any:
        """Of a mean cross-entropy: the number of tokens with a label, or the sum of the weights of
        their classes."""
        target, ignored = self.by_node[match.bindings["target"]], match.values["ignore_index"]
        valid = target != ignored
        weight = self.class_weight()
        if weight is None:
            return valid.sum()
        return (weight[target.where(valid, 0)] * valid).sum()

    def with_the_rest(self, total: Any) -> Any:
        """``total`` and what else the model adds on the way to the end."""
        end = self.head.outputs[0]
        seen = {step.node for terms in self.head.chunks for t in terms for step in t.steps}
        seen |= {term.start for terms in self.head.chunks for term in terms}
        done = set()
        for terms in self.head.chunks:
            for term in terms:
                for i, step in enumerate(term.steps):
                    added = step.added
                    if step.node in done or added is None or self.head.view.resolve(added) in seen:
                        continue
                    done.add(step.node)
                    if isinstance(added, int | float) and added == 0:
                        continue
                    number = self.transpose.coefficient(term.steps[i + 1 :])
                    sign = -1.0 if step.op == "sub" and step.node.args[1] is added else 1.0
                    total = total + times(times(self.transpose.of(added), sign), number)
        return total

    def reads(self, made: Any) -> list[Any]:
        """The numbers of the nodes that are read on the way to the sum."""
        terms, wanted = self.head.terms, self.head.outputs[1:]
        if not wanted:
            return []
        values = made[1]
        found = {term.start: self.read(term, values[i]) for i, term in enumerate(terms)}
        steps = {step.node: step for term in terms for step in term.steps}
        for node in sorted(steps):
            if node <= max(wanted):
                found[node] = self.copy(node, found)
        return [found[node] for node in wanted]

    def copy(self, node: fx.Node, found: dict[fx.Node, Any]) -> Any:
        """The node once more, of other values."""

        def operand(arg: fx.Node) -> Any:
            return found[arg] if arg in found else self.operand(arg)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        return self.hidden.tracer.create_proxy(node.op, node.target, args, kwargs)

    def read(self, term: Term, values: Any) -> Any:
        """The start of a term, of its values [N]."""
        shape = fake(term.start).shape
        if not any(step.weighs_tokens for step in term.inner):
            return self._unweighted(term, values, shape)
        values = values * self._of_values(term, term.inner)
        return values.reshape(self.transpose.shape(shape)) if len(shape) else values.sum()

    def _unweighted(self, term: Term, values: Any, shape: Any) -> Any:
        if not len(shape):
            return self._of_values(term, term.inner, values.sum())
        values = values.reshape(self.transpose.shape(shape))
        number = self._of_values(term, term.inner)
        return -values if isinstance(number, float) and number == -1.0 else times(values, number)


def _mask_of_users(head: Head) -> fx.Node | None:
    """The mask of bools of tokens by which every output, and nothing else of it, is multiplied."""
    masks = {_mask_of(head, node) if fake(node).dim() else None for node in head.outputs}
    return masks.pop() if len(masks) == 1 else None


def _mask_of(head: Head, node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users), None)
    if user is None or len(node.users) > 1:
        return None
    if op_name(user) == "neg":
        return _mask_of(head, user)
    if op_name(user) != "mul":
        return None
    return next((f for f in user.args if _is_mask(head, f, fake(node).shape)), None)  # type: ignore[misc, return-value]


def _is_mask(head: Head, factor: Any, shape: torch.Size) -> bool:
    if not isinstance(factor, fx.Node) or not factor < head.first:
        return False
    value = fake(factor)
    is_bools = isinstance(value, torch.Tensor) and value.dtype == torch.bool
    return is_bools and same_sizes(value.shape, shape) and not head.view.effects.written(factor)
