"""Tensors as the data plane sees them: dtype, shape, bytes.

Knows torch and numpy; knows no network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from mapreduce.core.dtypes import dtype_from_label, dtype_from_numpy
from mapreduce.errors import UnsupportedTensor
from mapreduce.wire.bodies import MAX_DIMENSIONS, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

# Any: the element type is checked at run time.
Tensor: TypeAlias = torch.Tensor | np.ndarray[Any, np.dtype[Any]]


def describe(tensor: Tensor, *, written: bool) -> TensorSpec:
    """Dtype and shape of a tensor that a collective can use; `written` if the result goes into it.

    Raises UnsupportedTensor, which says what to pass instead.
    """
    if isinstance(tensor, torch.Tensor):
        return _describe_torch(tensor, written)
    if isinstance(tensor, np.ndarray):
        return _describe_numpy(tensor, written)
    raise UnsupportedTensor(
        f"a torch.Tensor or numpy.ndarray is needed, not {type(tensor).__name__}"
    )


def _describe_torch(tensor: torch.Tensor, written: bool) -> TensorSpec:
    if tensor.layout is not torch.strided:
        raise UnsupportedTensor(f"a {tensor.layout} tensor: pass tensor.to_dense()")
    if tensor.device.type != "cpu":
        raise UnsupportedTensor(
            f"the tensor is on {tensor.device}: pass tensor.cpu() and copy the result back"
        )
    if tensor.is_quantized:
        raise UnsupportedTensor("a quantized tensor: pass tensor.int_repr() or tensor.dequantize()")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UnsupportedTensor(
            "the tensor requires grad, and collectives are not differentiated: pass tensor.grad, "
            "tensor.detach() or call under torch.no_grad()"
        )
    if written and _overlaps(tensor.shape, tensor.stride()):
        raise UnsupportedTensor(
            "elements of the tensor share memory (it is expanded or unfolded): pass "
            "tensor.contiguous()"
        )
    if written and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise UnsupportedTensor("an inference tensor cannot be written: pass tensor.clone()")
    _check_dimensions(tensor.ndim)
    dtype = dtype_from_label(str(tensor.dtype).removeprefix("torch."))
    return TensorSpec(dtype=dtype, shape=tuple(tensor.shape))


def _describe_numpy(array: np.ndarray[Any, np.dtype[Any]], written: bool) -> TensorSpec:
    if written and not array.flags.writeable:
        raise UnsupportedTensor("the array is read-only and the result goes into it: pass a copy")
    _check_dimensions(array.ndim)
    return TensorSpec(dtype=dtype_from_numpy(array.dtype), shape=array.shape)


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements may share memory: a stride too short for what smaller ones span."""
    if 0 in shape:
        return False
    reach = 1  # elements that the dimensions of smaller stride span
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_dimensions(count: int) -> None:
    if count > MAX_DIMENSIONS:
        raise UnsupportedTensor(f"a tensor of {count} dimensions: at most {MAX_DIMENSIONS}")


def as_bytes(tensor: Tensor) -> tuple[memoryview, bool]:
    """The elements in C order, and whether they are the tensor's own memory: where it is not
    contiguous they are a copy."""
    if isinstance(tensor, torch.Tensor):
        # copy: only if it is not contiguous; the wire needs one run of bytes
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data, flat.data_ptr() == tensor.data_ptr()
    array = np.ascontiguousarray(tensor).reshape(-1)
    return array.view(np.uint8).data, array.ctypes.data == tensor.ctypes.data


def assign(tensor: Tensor, result: memoryview) -> None:
    """Copies the bytes of a result into a tensor that is not contiguous."""
    if len(result) == 0:
        return
    # copy: a result comes as one run of bytes
    if isinstance(tensor, torch.Tensor):
        with torch.no_grad():
            tensor.copy_(torch.frombuffer(result, dtype=tensor.dtype).view(tensor.shape))
    else:
        np.copyto(tensor, np.frombuffer(result, dtype=tensor.dtype).reshape(tensor.shape))


def mark_written(tensor: Tensor) -> None:
    """Tells autograd that the tensor's memory has changed behind its back."""
    if isinstance(tensor, torch.Tensor) and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def new_tensor(spec: TensorSpec, data: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
    """A torch tensor over the received bytes, without a copy."""
    dtype = getattr(torch, spec.dtype.label)
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).view(spec.shape)
