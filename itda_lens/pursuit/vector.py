"""Instructions that numba's own compiler does not arrive at: what makes the kernels vectorised on every processor."""

from typing import no_type_check

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FAST = ("nnan", "ninf", "nsz", "reassoc", "contract")
TILE = 128
"""Correlations that `subtract_rows` takes together: eight vector registers of AVX-512, sixteen of AVX2."""


@intrinsic
@no_type_check
def larger(typing_context, a, b):
    """The larger of two floats, in a form that LLVM vectorises, which it does not do with Python's `max`."""

    def emit(context, builder, signature, args):
        return _maximum(builder, args[0], args[1])

    return a(a, a), emit


@intrinsic
@no_type_check
def subtract_rows(typing_context, row, rows, weights, count, first, sign):
    """Subtract `weights[:count] @ rows[:count]` from `row`, in the columns from `first` to `first + TILE`.

    The rows are whole numbers of 16 bits. Returns the largest of what is left: in size with `sign` -1, as it is (0 at
    least) with `sign` 0. The row is read and written once, and held in registers meanwhile.
    """

    def emit(context, builder, signature, args):
        arrays = [
            context.make_array(kind)(context, builder, arg)
            for kind, arg in zip(signature.args[:3], args[:3], strict=True)
        ]
        row, rows, weights = (array.data for array in arrays)
        stride = builder.extract_value(arrays[1].shape, 1)
        count, first, sign = args[3:]
        kind = row.type.pointee
        vector = ir.VectorType(kind, TILE)
        small, wide = (ir.VectorType(ir.IntType(bits), TILE) for bits in (16, 32))
        bytes_each = 4 if kind == ir.FloatType() else 8

        def tile(base, offset, vector):
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        place, entry = tile(row, first, vector), builder.block
        start = builder.load(place, align=bytes_each)
        loop, body, done = (builder.append_basic_block(name) for name in ("loop", "body", "done"))
        builder.branch(loop)
        builder.position_at_end(loop)
        i, left = builder.phi(count.type), builder.phi(vector)
        builder.cbranch(builder.icmp_signed("<", i, count), body, done)
        builder.position_at_end(body)
        other = builder.load(tile(rows, builder.add(builder.mul(i, stride), first), small), align=2)
        other = builder.sitofp(builder.sext(other, wide), vector)
        weight = _spread(builder, builder.load(builder.gep(weights, [i])), vector)
        taken = builder.fsub(left, builder.fmul(weight, other, flags=FAST), flags=FAST)
        for phi, before, after in ((i, count.type(0), builder.add(i, count.type(1))), (left, start, taken)):
            phi.add_incoming(before, entry)
            phi.add_incoming(after, body)
        builder.branch(loop)
        builder.position_at_end(done)
        builder.store(left, place, align=bytes_each)
        size = _maximum(builder, left, builder.fmul(_spread(builder, sign, vector), left, flags=FAST))
        reduce = _function(builder, "llvm.vector.reduce.fmax", kind, [vector])
        return builder.call(reduce, [size], fastmath=("nnan", "nsz"))

    return row.dtype(row, rows, weights, types.intp, types.intp, row.dtype), emit


@no_type_check
def _maximum(builder, a, b):
    return builder.call(_function(builder, "llvm.maxnum", a.type, [a.type, a.type]), [a, b], fastmath=("nnan", "nsz"))


@no_type_check
def _function(builder, name, result, arguments):
    kind = arguments[0]
    lanes, scalar = (f"v{kind.count}", kind.element) if isinstance(kind, ir.VectorType) else ("", kind)
    name = f"{name}.{lanes}{scalar.intrinsic_name}"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@no_type_check
def _spread(builder, scalar, vector):
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(single, undefined, lanes)
