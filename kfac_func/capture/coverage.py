"""What becomes of every parameter: claimed by a kind, unclaimed under a policy the user chose, or unused. Nothing is
skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from kfac_func._errors import CaptureError, HyperparameterError, UncapturedParameterError, explain

Policy: TypeAlias = Literal["diagonal", "identity"]
"""For a parameter without a kind: the diagonal of the curvature (estimated from zero-mean vectors), or no
preconditioning.
"""

Unclaimed: TypeAlias = Policy | Mapping[str, Policy]


def check_policies(unclaimed: Unclaimed) -> dict[str, Policy]:
    """The policies by path pattern. Raises HyperparameterError for a policy that does not exist."""
    rules: dict[str, Policy] = {"*": unclaimed} if isinstance(unclaimed, str) else dict(unclaimed)
    for pattern, policy in rules.items():
        if policy not in ("diagonal", "identity"):
            raise HyperparameterError(
                explain(
                    f"unknown policy for the parameters {pattern!r}.",
                    got=repr(policy),
                    wanted="'diagonal' or 'identity'",
                )
            )
    return rules


def choose(
    paths: tuple[str, ...], strays: dict[str, list[str]], rules: dict[str, Policy], strict: bool
) -> dict[str, Policy]:
    """The policy of every leaf that is not claimed.

    A rule that names a path (or a pattern other than "*") takes the leaf from its kind; "*" speaks only of leaves
    without one. Raises UncapturedParameterError when `strict` and a leaf without a kind has no rule, CaptureError
    when a rule matches no leaf.
    """
    chosen: dict[str, Policy] = {}
    for pattern, policy in rules.items():
        matched = [path for path in paths if fnmatchcase(path, pattern)]
        if not matched:
            raise CaptureError(
                explain(
                    f"the policy for {pattern!r} matches no parameter.",
                    got=", ".join(map(repr, paths[:20])),
                    options="mend the path",
                )
            )
        for path in matched:
            if path in strays or pattern != "*":
                chosen.setdefault(path, policy)
    missing = [path for path in strays if path not in chosen]
    if missing and strict:
        raise UncapturedParameterError(_uncaptured({path: strays[path] for path in missing}))
    for path in missing:
        chosen[path] = "identity"
    return chosen


SHOWN = 3  # parameters that an error names one by one


def _uncaptured(strays: dict[str, list[str]]) -> str:
    """One by one, or by operation when there are many."""
    wanted = "the parameter itself as weight of linear, conv, embedding, norm, matmul or einsum"
    if len(strays) <= SHOWN:
        return "\n".join(
            explain(
                f"parameter {path!r} is used where K-FAC cannot see it.",
                **{"used by": ", ".join(dict.fromkeys(ops))},
                wanted=wanted,
                options=f"write the use that way; or unclaimed={{{path!r}: 'diagonal'}} (or 'identity'); or "
                "strict=False",
            )
            for path, ops in strays.items()
        )
    by_use: dict[str, list[str]] = {}
    for path, ops in strays.items():
        by_use.setdefault(", ".join(dict.fromkeys(ops)), []).append(path)
    return explain(
        f"{len(strays)} parameters are used where K-FAC cannot see them.",
        **{f"by {use}": _some(paths) for use, paths in list(by_use.items())[:10]},
        others=f"{len(by_use) - 10} more kinds of uses" if len(by_use) > 10 else None,
        wanted=wanted,
        options="write the uses that way; or unclaimed='diagonal' (or 'identity') for all of them, "
        f"unclaimed={{{next(iter(strays))!r}: 'diagonal'}} for some, by path or pattern; or strict=False",
    )


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(map(repr, paths[:SHOWN])) + more
