"""The op in the place of a `Head`, and what the graph still computes around it."""

from __future__ import annotations

from typing import Any

import torch
from liger_fx.passes._rows import head_arguments, kept_rows, temperature
from liger_fx.passes._sums import Step
from liger_fx.passes._taken import Head, Term
from liger_fx.passes._transpose import Number, Transpose, dims_of, is_tensor, times
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, op_name, same_sizes, specialise
from liger_fx.matcher import Match


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
        number = self.transpose.apply(steps, term.has_classes, number)
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
        own = {node for terms in self.head.chunks for term in terms for node in term.path}
        steps: dict[fx.Node, list[Step]] = {}  # each that adds, and those after it
        for terms in self.head.chunks:
            for term in terms:
                for i, step in enumerate(term.steps):
                    if step.op in ("add", "sub"):
                        steps.setdefault(step.node, term.steps[i:])
        for step, *rest in steps.values():
            added = self.head.view.resolve(step.operand)
            if added in own or (isinstance(added, int | float) and added == 0):
                continue
            negated = step.op == "sub" and step.node.args[0] is step.source
            number = times(self.transpose.of(added), self.transpose.apply(rest))
            total = total - number if negated else total + number
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
