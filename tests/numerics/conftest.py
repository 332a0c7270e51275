"""What several files of numerics look at."""

import pytest

from blockroll.policies.compiled import CompiledLayers


@pytest.fixture
def calls(monkeypatch):
    """Rows of every forward that compiled layers have run."""
    rows, run_rows = [], CompiledLayers._run

    def counted(self, x_BRW, *rest):
        rows.append(x_BRW.shape[0] * x_BRW.shape[1])
        return run_rows(self, x_BRW, *rest)

    monkeypatch.setattr(CompiledLayers, "_run", counted)
    return rows
