"""From what is taken of rows of logits to matches: one for each projection, which ends in a sum
where there is one (`passes._head`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from liger_fx.passes._chunks import whole_of
from liger_fx.passes._rows import slices, temperature
from liger_fx.passes._sums import Walk, readers
from liger_fx.passes._taken import Head, Taken, Term, sizes_of
from torch import fx

from liger_fx import ops
from liger_fx.canonical import View, fake, op_name
from liger_fx.matcher import Match, Matcher, Reject, candidates, interior
from liger_fx.pattern import Pattern, traced

_HIDDEN = ("hidden", "teacher_hidden")  # cut into chunks with the labels; all else is common


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
    weighted = values["class_weight"] is not None or values["label_smoothing"]
    if weighted or "softcap" in values or temperature(match) != 1.0:
        raise Reject(
            "the cross-entropy beside a divergence has class weights, label smoothing, a softcap "
            "or a temperature; the kernel has not"
        )


def _named(terms: list[Term]) -> str:
    return " and ".join(term.taken.name for term in terms)


def _follow(view: View, term: Term, taken: set[fx.Node]) -> None:
    """Find the steps after a value. Raises `Reject` for classes that are not added up."""
    sizes = sizes_of(term.match.bindings, term.match)
    steps = list(Walk(view, sizes, taken).steps(term.root, term.has_classes))
    if not term.has_classes:
        term.steps = steps
        return
    at = next((i for i, step in enumerate(steps, 1) if step.reduces), None)
    if at is None or any(readers(step.source) for step in steps[:at]):
        raise Reject(
            "the divergences of single classes leave the graph, or are added up by more than "
            "sum(), mean(), masks and weights of tokens; jsd[mask] ends the graph, jsd * mask does "
            "not"
        )
    term.inner, term.steps = steps[:at], steps[at:]


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
        of_path = [node for node in term.path if readers(node)] if term in adding else [term.start]
        term.read = [node for node in of_path if node is not end]
        outputs += (node for node in term.read if node not in outputs)
    if len(outputs) > 1 and (
        len(chunks) > 1 or any(step.written for term in adding for step in term.steps)
    ):
        return None
    own = {node for term in terms for node in term.path}
    steps = [step for term in terms for step in (*term.inner, *term.steps)]
    if any(step.written not in {None, step.source, *own} for step in steps):
        return None  # somebody else's number is added to
    operands = {other for step in steps for other in step.others} - own
    head = _joined(view, chunks, outputs, operands)
    if head is None or any(not operand < head.first for operand in operands):
        return None
    head.summed = True
    head.every_value = any(_is_read_unweighted(term) for term in terms)
    return head


def _is_read_unweighted(term: Term) -> bool:
    """Is a value read of tokens that a later step can take times zero, or that is in no sum?"""
    if not term.read:
        return False
    at = term.path.index(term.read[0])
    return not term.steps or any(step.may_drop_tokens for step in term.steps[at:])


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
