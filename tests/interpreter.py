"""Triton's interpreter in the tests: working beside NumPy 2.4, and in a quarter of the time.

What it spends its time on is no arithmetic: types of numbers and shapes that it works out anew for
every operation, and the whole language that it prepares for every launch. Here each is made once.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace


def mend() -> None:
    """Mend Triton 3.6's interpreter, for good: nothing is compiled in this process."""
    import triton.language
    from triton.runtime import interpreter

    core = triton.language.core
    remember_dtypes(interpreter, core)
    remember_shapes(core)
    remember_blocks(core)
    leave_equal_shapes(interpreter, core)
    prepare_once(interpreter, triton.language)
    multiply_bfloat16(interpreter, triton.language)


def prepare_once(interpreter, language) -> None:
    """The language is prepared now, instead of at each launch and at each call of a function.

    Arrays of one number may be indices again, which NumPy refuses.
    """
    patch_tensor, nothing = interpreter._patch_lang_tensor, interpreter._LangPatchScope()
    semantic = interpreter.TritonSemantic(interpreter.interpreter_builder)

    def patch_attribute(obj, name, member, builder, scope):
        def call(*arguments, **named):
            named["_semantic"] = semantic
            return member(*arguments, **named)

        scope.set_attr(obj, name, call)

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call(self, *arguments, **named):
        return self.rewrite()(*arguments, **named)

    interpreter._patch_attr, interpreter._patch_lang_tensor = patch_attribute, patch_index
    modules = {"tl": language, "core": language.core}
    interpreter._patch_lang(SimpleNamespace(__globals__=modules))
    interpreter._patch_lang = lambda function: nothing
    interpreter.InterpretedFunction.__call__ = call


def remember_dtypes(interpreter, core) -> None:
    """NumPy's dtype of numbers is looked for once."""
    dtype_of = interpreter._get_np_dtype
    of_numbers = functools.cache(dtype_of)

    def dtype_for(kind):
        scalar = kind.element_ty if isinstance(kind, core.block_type) else kind
        return dtype_of(kind) if isinstance(scalar, core.pointer_type) else of_numbers(scalar)

    interpreter._get_np_dtype = dtype_for


def remember_shapes(core) -> None:
    """The type of a tuple of whole numbers, as a shape is, is made once."""
    type_of = core._type_for_tuple_values
    of_numbers = functools.cache(type_of)

    def type_for(values, fields=None):
        numbers = tuple(getattr(value, "value", value) for value in values)
        if fields is None and all(type(number) is int for number in numbers):
            return of_numbers(numbers)
        return type_of(values, fields)

    core._type_for_tuple_values = type_for


def remember_blocks(core) -> None:
    """What blocks of a shape have in common is worked out once, and the shape of their tensors."""
    make, known = core.block_type.__init__, {}

    def block(self, element_ty, shape):
        numbers = tuple(getattr(number, "value", number) for number in shape)
        if numbers not in known:
            make(self, element_ty, shape)
            constants = core.tuple([core.constexpr(number) for number in numbers])
            known[numbers] = self.shape, self.numel, core.constexpr(self.numel), constants
        self.shape, self.numel, *self.of_tensors = known[numbers]
        self.element_ty, self.name = element_ty, f"<{numbers}, {element_ty}>"

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = getattr(type, "of_tensors", alone)

    alone = core.constexpr(1), core.tuple([])
    core.block_type.__init__, core.tensor.__init__ = block, tensor


def leave_equal_shapes(interpreter, core) -> None:
    """Operands of one shape are not compared number by number, nor a type with itself by name."""
    broadcast, equal = interpreter.TritonSemantic.broadcast_impl_value, core.dtype.__eq__

    def broadcast_if_need_be(self, one, other):
        shapes = [getattr(operand.type, "shape", None) for operand in (one, other)]
        return (one, other) if shapes[0] is shapes[1] else broadcast(self, one, other)

    interpreter.TritonSemantic.broadcast_impl_value = broadcast_if_need_be
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def multiply_bfloat16(interpreter, language) -> None:
    """Its product of bfloat16 tensors is one of their bits, as whole numbers: now of the values."""
    dot = interpreter.InterpreterBuilder.create_dot

    def values(tensor):
        if tensor.dtype.scalar != language.bfloat16:
            return tensor
        bits = tensor.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), language.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, values(a), values(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
