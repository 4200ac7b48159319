# SPDX-License-Identifier: Apache-2.0
"""The quantized layer: integer weight, an input rounded to integers or not, one matrix product.

Shapes: N out_features, K in_features, G timestep groups. The names of its tensors are the file format (design.md, 6).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffusers_dq_kernels as ops
from diffusers_dq.affine import QuantizedWeight
from diffusers_dq.layout import NOT_ROUNDED, LinearLayout
from diffusers_dq.shared_input import RoundedInput, SharedInput
from diffusers_dq.timesteps import TimestepGroups

_ROUNDED = "_diffusers_dq_rounded"  # attribute of an activation while torch.compile traces

# What a layer does to its input, besides its layout.
_INPUT_TABLES = ("input_scale", "input_zero_point", "input_inv_smooth", "input_shift", "rotation_signs")


class QuantizedLinear(nn.Linear):
    """y = dequantize(Q(T_g(x)) Q(W')^T) + b'_g, with T_g, W', b'_g as transforms/base.py defines them.

    weight: Parameter, int8 [N, K] for 8 and 6 bits, packed uint8 [N, K / 2] for 4 (packing.py), or floating point
    where not rounded.
    bias: Parameter [N] or None; with timestep groups it gives way to `bias_groups` [G, N].
    low_rank_down, low_rank_up: Parameters [r, K] and [N, r] or None, of the input as it arrives: y gains x D^T U^T.
    Buffers, fp32 whatever the model is cast to (fp64 where an fp64 weight is not rounded): weight_scale [N], or of
    groups [N, K / g], then perhaps with weight_zero_point int8;
    input_scale [1 or G] and input_zero_point int32 of a static scheme; input_inv_smooth [K], input_shift [1 or G, K]
    and rotation_signs [K] int8 of an online transform. Derived, in no file: weight_sum, column_scale, column_bias.
    An `nn.Linear` by class, so that LoRA, offloading and skip lists find it.
    """

    bias_groups: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_inv_smooth: Tensor | None
    input_shift: Tensor | None
    rotation_signs: Tensor | None
    weight_sum: Tensor | None
    column_scale: Tensor | None
    column_bias: Tensor | None
    partition: Tensor
    low_rank_down: nn.Parameter | None
    low_rank_up: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: LinearLayout,
        groups: TimestepGroups,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        layout.check_width(in_features)
        dtype = dtype or torch.get_default_dtype()
        # the integer kernels take fp32; only what is not rounded has use for the precision of an fp64 model
        table = torch.float32 if layout.rounds_weight else torch.promote_types(dtype, torch.float32)
        self.layout = layout
        self._groups = (groups,)  # in a tuple: shared by all layers, a submodule of none of them
        self._shared_input: SharedInput | None = None
        self._first_reader: tuple[QuantizedLinear, ...] = ()
        self.readers = 1  # of the input that this layer rounds, itself among them
        self.weight = nn.Parameter(self._empty_weight(dtype, device), requires_grad=False)
        if bias and not layout.bias_groups:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        rank = layout.low_rank
        for name, shape in (("low_rank_down", (rank, in_features)), ("low_rank_up", (out_features, rank))):
            factor = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name, factor if rank else None)

        def buffer(name: str, shape: tuple[int, ...] | None, dtype: torch.dtype = table, keep: bool = True) -> None:
            tensor = None if shape is None else torch.zeros(shape, dtype=dtype, device=device)
            # accelerate's sequential offloading (1.15) takes every non-persistent buffer for a tensor
            self.register_buffer(name, tensor, persistent=keep or tensor is None)

        n, k = out_features, in_features
        buffer("bias_groups", (layout.bias_groups, n) if layout.bias_groups else None)
        of_weight = (n, k // layout.group_size) if layout.group_size else (n,)
        buffer("weight_scale", of_weight if layout.rounds_weight else None)
        buffer("weight_zero_point", of_weight if layout.weight_zero_points else None, torch.int8)
        buffer("input_scale", (layout.range_groups,) if layout.static else None)
        buffer("input_zero_point", (layout.range_groups,) if layout.static else None, torch.int32)
        buffer("input_inv_smooth", (k,) if layout.smooth else None)
        buffer("input_shift", (layout.shift_groups, k) if layout.shift_groups else None)
        buffer("rotation_signs", (k,) if layout.rotation_order > 1 else None, torch.int8)
        self._folds_range = layout.static and layout.range_groups == 1
        summed = layout.input_zero_points or (layout.static and not self._folds_range)
        buffer("weight_sum", of_weight if summed else None, torch.int32, keep=False)
        buffer("column_scale", of_weight if self._folds_range else None, keep=False)
        buffer("column_bias", (max(1, layout.bias_groups), n) if self._folds_range else None, keep=False)
        # never on meta, though the rest may be: it is known, and it is no tensor of a file
        place = None if device is None or torch.device(device).type == "meta" else device
        self.register_buffer("partition", torch.tensor([layout.partition], device=place), persistent=False)

    def _empty_weight(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        n, k, bits = self.out_features, self.in_features, self.layout.weight_bits
        if bits == 4:
            return torch.empty(n, k // 2, dtype=torch.uint8, device=device)
        return torch.empty(n, k, dtype=torch.int8 if self.layout.rounds_weight else dtype, device=device)

    @property
    def groups(self) -> TimestepGroups:
        return self._groups[0]

    def tables(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to the file besides weight and bias."""
        for name, tensor in self.named_buffers(recurse=False):
            if name not in self._non_persistent_buffers_set:
                yield name, tensor

    @property
    def is_whole(self) -> bool:
        """Whether all that belongs to the file is there, nothing on the meta device."""
        stored = *self.parameters(recurse=False), *(table for _, table in self.tables())
        return not any(tensor.is_meta for tensor in stored)

    def integer_weight(self) -> Tensor:
        """int8 [N, K]."""
        return ops.unpack_int4(self.weight.data) if self.layout.weight_bits == 4 else self.weight.data

    def finish_loading(self) -> None:
        """Derive what is not stored: call once the layer `is_whole`."""
        self.partition = torch.tensor([self.layout.partition], device=self.weight.device)
        if self.weight_sum is not None:
            self.weight_sum = self._weight_sum()
        if self._folds_range:
            self.column_scale, self.column_bias = self._column_terms()

    def _column_terms(self) -> tuple[Tensor, Tensor]:
        """What one input range for all timesteps makes of weight_scale and bias: y = acc column_scale + column_bias_g.

        Shapes [N] or [N, K / g], and [1 or G, N]. With s and z the input's: column_scale = s weight_scale, and
        column_bias = bias - z sum_k column_scale q, worked out in fp64.
        """
        assert self.weight_scale is not None and self.input_scale is not None and self.input_zero_point is not None
        scale = self.weight_scale.double() * self.input_scale.double()
        offset = scale * self._weight_sum() * self.input_zero_point
        offset = offset if offset.ndim == 1 else offset.sum(dim=1)
        bias = self._bias()
        bias = -offset if bias is None else bias.detach().double() - offset
        return scale.to(self.weight_scale.dtype), bias.to(self.weight_scale.dtype).view(-1, self.out_features)

    def _weight_sum(self) -> Tensor:
        """int32 [N], or by group [N, K / g] without the zero points: what an input's zero point is multiplied by."""
        q, size = self.integer_weight(), self.layout.group_size
        if not size:
            return q.sum(dim=1, dtype=torch.int32)
        sums = q.unflatten(1, (-1, size)).sum(dim=2, dtype=torch.int32)
        return sums if self.weight_zero_point is None else sums - size * self.weight_zero_point.int()

    def reads_like(self, other: "QuantizedLinear") -> bool:
        """Whether the two round an input of both to the same integers and scales."""
        return (
            self.layout.rounds_input
            and self.layout.of_input == other.layout.of_input
            and all(
                getattr(self, name) is None or torch.equal(getattr(self, name), getattr(other, name))
                for name in _INPUT_TABLES
            )
        )

    def share_input(self, first: "QuantizedLinear") -> None:
        """Use what `first` makes of the same activation; `first` reads like this layer."""
        if first._shared_input is None:
            first._shared_input = SharedInput()
        first.readers += 1
        self._shared_input = first._shared_input
        self._first_reader = (first,)  # in a tuple: no submodule

    @property
    def activation_bits(self) -> int:
        """Of the input in this step; 16 is not rounded."""
        of_step = self.groups.activation_bits if self.layout.rounds_input else None
        return self.layout.activation_bits if of_step is None else of_step

    @property
    def rounds_input(self) -> bool:
        """In this step."""
        return self.activation_bits < NOT_ROUNDED

    def forward(self, input: Tensor) -> Tensor:
        """Named as nn.Linear names it, for calls by keyword."""
        output = self.product(self.rounded(input), input.dtype) if self.rounds_input else self._unrounded(input)
        return output if self.low_rank_down is None else output + self.low_rank_part(input)

    def low_rank_part(self, x: Tensor) -> Tensor:
        """x D^T U^T, [..., N] of x's dtype."""
        assert self.low_rank_down is not None and self.low_rank_up is not None
        return F.linear(F.linear(x, self.low_rank_down.to(x.dtype)), self.low_rank_up.to(x.dtype))

    def rounded(self, x: Tensor) -> RoundedInput:
        """x: [..., K] float, as integers: the transform and the rounding of this layer's input."""
        if torch.compiler.is_compiling():
            return self._rounded_in_graph(x)
        group = self._group(x.device)
        if self._shared_input is None:
            return self._round(x, group)
        found = self._shared_input.find(x, self.groups.index, self.activation_bits)
        if found is None:
            found = self._round(x, group)
            self._shared_input.keep(x, self.groups.index, found, self.activation_bits)
        return found

    def rounded_norm(self, hidden_states: Tensor, norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> RoundedInput:
        """`rounded` of LN(hidden_states) (1 + scale) + shift, without writing that out.

        hidden_states: [B, T, K].   scale, shift: [B, K].
        """
        return self._round_norm(hidden_states, norm, scale, shift, keep=False)[1]

    def shared_norm(self, hidden_states: Tensor, norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> Tensor:
        """LN(hidden_states) (1 + scale) + shift, which all who share this layer's input find rounded already.

        Shapes as in `rounded_norm`.   Returns [B, T, K], of the dtype of hidden_states.
        """
        if torch.compiler.is_compiling():
            x, rounded = self._round_norm(hidden_states, norm, scale, shift, keep=True)
            x = x.view_as(x)  # Dynamo (2.13) sets no attributes of a tensor that came in a tuple from an op
            setattr(x, _ROUNDED, (self, rounded, self.readers))
            return x
        gradients = torch.is_grad_enabled()  # for an op to refuse
        # a tensor that counts its writes, so that it may be kept
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            x, rounded = self._round_norm(hidden_states, norm, scale, shift, keep=True)
        self._shared_input = self._shared_input or SharedInput()
        self._shared_input.keep(x, self.groups.index, rounded, self.activation_bits)
        return x

    def _round_norm(
        self, h: Tensor, norm: nn.LayerNorm, scale: Tensor, shift: Tensor, keep: bool
    ) -> tuple[Tensor, RoundedInput]:
        transform = self._transform_arguments(self._group(h.device))
        normed = (h, "layer", norm.eps, norm.weight, norm.bias, scale, shift, keep)
        if self.layout.static:
            integers, x = ops.norm_quantize_static(*normed, self.input_scale, self.input_zero_point, *transform)
            return x, RoundedInput(integers, None)
        integers, tokens, x = ops.norm_quantize_dynamic(*normed, *transform)
        return x, RoundedInput(integers, tokens)

    def _rounded_in_graph(self, x: Tensor) -> RoundedInput:
        """The same while torch.compile traces, which carries Python attributes of intermediate tensors along.

        Not of those that an op put out in a tuple: two linears that read what `chunk` gives, as it is, break the graph
        (torch 2.13). All who share read the tables of the first, unless an offloading hook has taken those away. The
        last takes the attribute back, so that it does not outlive the graph on a tensor that came from outside.
        """
        first = self._first_reader[0] if self._first_reader else self
        kept = getattr(x, _ROUNDED, None)
        if kept is None or kept[0] is not first:
            if first.readers == 1 or first.partition.device != x.device:
                return self._round(x, self._group(x.device))
            kept = (first, first._round(x, self._group(x.device)), first.readers)
        rounded: RoundedInput = kept[1]
        left = kept[2] - 1
        setattr(x, _ROUNDED, (first, rounded, left) if left else None)
        return rounded

    def _group(self, device: torch.device) -> Tensor:
        """[1] int64. A compiled graph must not depend on the number, which differs between blocks that share it."""
        index = self.groups.index
        if torch.compiler.is_compiling():
            return index.index_select(0, self.partition.to(index.device)).to(device)
        return index.narrow(0, self.layout.partition, 1).to(device)

    def _row(self, table: Tensor, group: Tensor) -> Tensor:
        return table[0] if len(table) == 1 else table.index_select(0, group).squeeze(0)

    def _transform(self, x: Tensor, group: Tensor) -> Tensor:
        """The online form of T_g, in the tables' precision."""
        if self.input_shift is None and self.input_inv_smooth is None and self.rotation_signs is None:
            return x
        u = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.input_shift is not None:
            u = u - self._row(self.input_shift, group)
        if self.input_inv_smooth is not None:
            u = u * self.input_inv_smooth
        if self.rotation_signs is not None:
            u = ops.rotate(u, self.rotation_signs, self.layout.rotation_order)
        return u.to(x.dtype)

    def transformed(self, x: Tensor) -> Tensor:
        """u = T_g(x) as far as this layer makes it, [..., K] of x's dtype."""
        return self._transform(x, self._group(x.device))

    def bias_row(self) -> Tensor | None:
        """[N], of the current timestep group."""
        if self.bias_groups is None:
            return None if self.bias is None else self.bias.to(torch.float32)
        return self._row(self.bias_groups, self._group(self.bias_groups.device))

    def range_row(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a static input in the current timestep group, [] each."""
        assert self.input_scale is not None and self.input_zero_point is not None
        group = self._group(self.input_scale.device)
        return self._row(self.input_scale, group), self._row(self.input_zero_point, group)

    def _bias(self) -> Tensor | None:
        return self.bias if self.bias_groups is None else self.bias_groups

    def _unrounded(self, x: Tensor) -> Tensor:
        group = self._group(x.device)
        x = self._transform(x, group)
        if self.layout.rounds_weight:
            product = ops.linear_w4a16 if self.layout.weight_bits == 4 else ops.linear_w8a16
            arguments = x, self.weight, self.weight_scale, self._bias(), group
            if self.weight_zero_point is None:
                return product(*arguments)
            return product(*arguments, None, None, "none", self.weight_zero_point)
        if self.bias_groups is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight) + self._row(self.bias_groups, group).to(x.dtype)

    def _round(self, x: Tensor, group: Tensor) -> RoundedInput:
        transform = self._transform_arguments(group)
        if self.layout.static:
            integers = ops.quantize_static(x, self.input_scale, self.input_zero_point, *transform)
            return RoundedInput(integers, None)
        if self.layout.input_rounding == "token":
            return RoundedInput(*ops.quantize_dynamic(x, *transform))
        if self.layout.input_rounding == "group":
            grouping = self.layout.group_size, not self.layout.input_zero_points
            return RoundedInput(*ops.quantize_grouped(x, *transform[:4], *grouping, *transform[4:]))
        return self._round_per_tensor(self._transform(x, group), group)

    def _transform_arguments(self, group: Tensor) -> tuple[Any, ...]:
        """The last of every op that rounds: what it does to the input first, and to how many bits it rounds."""
        channels = group, self.input_shift, self.input_inv_smooth, self.activation_bits
        return (
            channels if self.rotation_signs is None else (*channels, self.rotation_signs, self.layout.rotation_order)
        )

    def _round_per_tensor(self, u: Tensor, group: Tensor) -> RoundedInput:
        """One scale for the whole input, found now: as if every token had found the same."""
        qmax = (1 << (self.activation_bits - 1)) - 1
        scale = (u.abs().amax().float() / qmax).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
        zero_point = torch.zeros(1, dtype=torch.int32, device=u.device)
        integers = ops.quantize_static(u, scale, zero_point, group, None, None, self.activation_bits)
        return RoundedInput(integers, scale.expand(u.shape[:-1]))

    def product(
        self,
        rounded: RoundedInput,
        dtype: torch.dtype,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """residual + gate * activation(this layer's output) for an input that is rounded already, [..., N] of dtype.

        gate, residual, activation: see diffusers_dq_kernels.linear_w8a8.
        """
        if self.layout.group_size:
            return self._grouped_product(rounded, dtype, gate, residual, activation)
        product = ops.linear_w4a8 if self.layout.weight_bits == 4 else ops.linear_w8a8
        if self._folds_range:
            terms: tuple[Tensor | None, ...] = self.column_scale, None, None, None, self.column_bias
        else:
            scale = self.input_scale if rounded.scale is None else rounded.scale
            terms = self.weight_scale, scale, self.input_zero_point, self.weight_sum, self._bias()
        group = self._group(rounded.integers.device)
        return product(rounded.integers, self.weight, *terms, group, dtype, gate, residual, activation)

    def _grouped_product(self, rounded: RoundedInput, dtype: torch.dtype, *finish: Any) -> Tensor:
        """`product` where the weight has scales a group; finish: gate, residual, activation."""
        integers, scale, zero_point = rounded
        group, bias = self._group(integers.device), self._bias()
        if scale is None:
            assert self.input_scale is not None and self.input_zero_point is not None
            scale = self._row(self.input_scale, group).expand(integers.shape[:-1])
            groups = integers.shape[-1] // self.layout.group_size
            zero_point = self._row(self.input_zero_point, group).expand(*integers.shape[:-1], groups)
        if self._folds_range:
            zero_point, bias = None, self.column_bias
        if self.layout.input_rounding != "group":
            scale = scale[..., None]
        elif not self.layout.input_zero_points:
            zero_point = None
        of_weight = self.weight_zero_point, self.weight_sum
        return ops.linear_grouped(
            integers, self.weight, self.weight_scale, scale, zero_point, *of_weight, bias, group, dtype, *finish
        )

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary linear of the same function, up to the rounding that has happened.

        Raises ValueError where the function depends on the timestep group, which no ordinary linear's does.
        """
        if max(self.layout.bias_groups, self.layout.shift_groups) > 1:
            raise ValueError(
                "its bias or shift switches with the timestep group, so it has no equivalent nn.Linear: load the"
                " original checkpoint instead of dequantizing"
            )
        weight = self.weight.data
        if self.weight_scale is not None:
            weight = QuantizedWeight(self.integer_weight(), self.weight_scale, self.weight_zero_point).dequantized()
        bias = self.bias if self.bias_groups is None else self.bias_groups[0]
        if self.rotation_signs is not None:  # back: R^T is H on its own, then the signs
            unsigned = torch.ones_like(self.rotation_signs)
            weight = ops.rotate(weight, unsigned, self.layout.rotation_order) * self.rotation_signs
        if self.input_inv_smooth is not None:
            weight = weight * self.input_inv_smooth
        if self.input_shift is not None:
            bias = (0 if bias is None else bias) - self.input_shift[0].to(weight.dtype) @ weight.T
        if self.low_rank_down is not None and self.low_rank_up is not None:
            weight = weight + self.low_rank_up.to(weight.dtype) @ self.low_rank_down.to(weight.dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.layout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves follow the module, casts do not reach the tables: a scale rounded to bf16 is another scale."""
        buffers = self.named_buffers(recurse=False)
        tables = {name: tensor for name, tensor in buffers if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in tables.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
