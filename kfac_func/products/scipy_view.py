"""Products as SciPy's linear operators; the only importer of scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kfac_func import _tree
from kfac_func._errors import MissingPackageError, explain
from kfac_func._typing import PyTree


def as_scipy(product: Callable[[PyTree], PyTree], params: PyTree) -> Any:
    """A symmetric product on trees as a `scipy.sparse.linalg.LinearOperator` of shape [P, P], P parameters.

    product    tree -> tree, both like the parameters: a product of `kf.products`, or a solve. For `eigsh` near zero and
               for preconditioned solvers make a second operator of the solve (`OPinv=`, `M=`)
    params     gives the order, the shapes and the dtype: all leaves one after the other, in the order of the library
               (dictionary keys sorted), as NumPy vectors in at least float32 on the CPU

    Products are computed on the device and in the dtypes of the parameters, without derivatives.
    Raises MissingPackageError (an ImportError) without SciPy, and what the product raises.

        >>> from scipy.sparse.linalg import eigsh
        >>> operator = kf.products.as_scipy(lambda v: {"w": 2 * v["w"]}, {"w": torch.ones(3)})
        >>> operator.shape, eigsh(operator, k=1, return_eigenvectors=False)
        ((3, 3), array([2.], dtype=float32))
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise MissingPackageError(
            explain("as_scipy needs SciPy, which is not installed.", options="pip install scipy")
        ) from error
    flat, unravel = _tree.ravel(params)
    dtype = torch.promote_types(flat.dtype, torch.float32)

    def matvec(vector: Any) -> Any:
        with torch.no_grad():
            tree = unravel(torch.as_tensor(vector.reshape(-1), dtype=dtype, device=flat.device))
            return _tree.ravel(product(tree))[0].to("cpu", dtype).numpy()

    kind = torch.zeros((), dtype=dtype).numpy().dtype
    return LinearOperator(shape=(len(flat), len(flat)), matvec=matvec, rmatvec=matvec, dtype=kind)  # pyright: ignore[reportCallIssue]
