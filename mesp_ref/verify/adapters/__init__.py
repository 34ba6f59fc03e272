"""gradcheck for functions of other frameworks; each module imports its framework when it is used.

from mesp_ref.verify.adapters.torch import gradcheck_function  # a torch.autograd.Function
from mesp_ref.verify.adapters.triton import gradcheck_kernel   # the same around Triton kernels
from mesp_ref.verify.adapters.jax import gradcheck_custom_vjp  # a jax.custom_vjp function
from mesp_ref.verify.adapters.mlx import gradcheck_custom      # an mlx.core.custom_function
"""
