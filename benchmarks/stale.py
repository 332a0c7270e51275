"""Which rows are stale: measured before a package that they depend on changed.

A row depends on the packages of its subject. It is stale if any commit since its `package_commit` changed a
file in one of them, whatever the change: only measuring again shows whether a figure moved.
"""

from collections.abc import Sequence

from benchmarks.rows import Row, git

ENGINE = ("kernels", "policies", "samplers", "rollout")
DEPENDS = {
    "law": ENGINE,
    "speed": (*ENGINE, "bench"),
    "drafts": (*ENGINE, "bench", "rl_loops"),
    "learning": (*ENGINE, "rl_loops"),
    "constraints": ENGINE,
    "audit": ENGINE,
    "trl": (*ENGINE, "rl_loops"),
    "kernels": ("kernels",),
    "watch": (*ENGINE, "rl_loops"),
}
MARK = "> Measured at package commit"


def mark(name: str, rows: Sequence[Row]) -> str:
    """A line of the page: the package commit of an experiment's rows, and what changed since."""
    commits = sorted({row["package_commit"] for row in rows})
    changed = sorted({package for commit in commits for package in changed_since(name, commit)})
    verdict = "nothing they depend on has changed since"
    if changed == ["?"]:
        verdict = "**unknown** to this repository, so they may be stale"
    elif changed:
        verdict = f"**stale**: {', '.join(changed)} changed since"
    return f"{MARK} {', '.join(commits)}; {verdict}."


def changed_since(name: str, package_commit: str) -> list[str]:
    """Packages of a subject that changed after a commit; `?` if it is not in the history."""
    commit = package_commit.removesuffix("+changes")
    if not git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
        return ["?"]
    packages = DEPENDS[name.partition("_")[0]]
    since = ("log", "-1", "--format=%h", f"{commit}..", "--")
    return [package for package in packages if git(*since, f"blockroll/{package}")]


def unmarked(page: str) -> str:
    """The page without its marks, which depend on the history and not on the rows."""
    return "\n\n".join(part for part in page.split("\n\n") if not part.startswith(MARK))
