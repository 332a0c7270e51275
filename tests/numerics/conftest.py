"""What several files of numerics look at."""

import pytest

from blockroll.kernels.rows import logit_rows
from blockroll.kernels.rows.compiled import rows_library
from blockroll.policies.compiled import CompiledLayers
from tests.numerics.rows_by_hand import WAYS


@pytest.fixture
def calls(monkeypatch):
    """Rows of every forward that compiled layers have run."""
    rows, run_rows = [], CompiledLayers._run

    def counted(self, x_BRW, *rest):
        rows.append(x_BRW.shape[0] * x_BRW.shape[1])
        return run_rows(self, x_BRW, *rest)

    monkeypatch.setattr(CompiledLayers, "_run", counted)
    return rows


@pytest.fixture(params=WAYS)
def vocab_size(request, monkeypatch):
    """Of laws in each way that rows are read."""
    if request.param == "torch":
        monkeypatch.setattr(logit_rows, "rows_library", lambda: None)
    elif request.param == "compiled" and rows_library() is None:
        pytest.skip("there is no C compiler")
    return WAYS[request.param]
