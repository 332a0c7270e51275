"""The audit's files: no row stands twice, none is lost on a full disk, damage is named, all is shown."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from blockroll import cli
from blockroll.errors import AuditError, InvalidInput
from blockroll.rollout.audit.check import _equal_coins, check_audit
from blockroll.rollout.audit.files import audit_files, audit_mark, drop_audit, read_audit
from blockroll.rollout.audit.rows import AuditedRequest, AuditRows
from blockroll.rollout.audit.stats import audit_stats
from blockroll.rollout.audit.writer import NUMBERS, AuditWriter, row_checksums
from blockroll.samplers.check import equal_coins_limit
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.models import adapted_policy, prompts

pytestmark = pytest.mark.filterwarnings("ignore:plan .* drafts")
SAMPLING = Sampling(max_tokens=20)


@pytest.fixture(scope="module")
def policy():
    return adapted_policy("llama")


def serve(policy, writer, *, count=6, version=0):
    requests = make_requests(prompts(count), SAMPLING)
    rollouts = run(policy, requests, Plan(4), observers=(writer,), max_batch_size=4, policy_version=version)
    writer.flush()
    return rollouts


def command(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_rows_that_another_writer_drew_again_are_found_and_both_are_named(policy, tmp_path):
    """As after a kill: the step that was cut off bears the checkpoint's version, and is drawn again."""
    serve(policy, AuditWriter(tmp_path))
    first = audit_mark(tmp_path)
    serve(policy, AuditWriter(tmp_path), count=4)
    problem = check_audit(audit_files(tmp_path)).problem
    assert problem is not None
    assert problem.file not in first
    assert f"the row stands twice: {first[0]}, row" in problem.what
    drop_audit(tmp_path, 0, known=first)
    assert audit_mark(tmp_path) == first
    assert check_audit(audit_files(tmp_path)).passed


def test_what_a_checkpoint_knew_stays_and_what_came_after_it_goes(policy, tmp_path):
    for version in (0, 1):
        serve(policy, AuditWriter(tmp_path), version=version)
    known = audit_mark(tmp_path)
    for version in (1, 2):
        serve(policy, AuditWriter(tmp_path), version=version)
    assert len(audit_mark(tmp_path)) == 4
    drop_audit(tmp_path, 1, known=known)
    assert audit_mark(tmp_path) == known


def test_an_id_that_one_writer_serves_again_is_another_request_everywhere(policy, tmp_path):
    writer = AuditWriter(tmp_path)
    rollouts = serve(policy, writer)
    for version in (0, 3):
        serve(policy, writer, version=version)
    report = check_audit(audit_files(tmp_path), policy_of=lambda version: policy)
    assert report.problem is None, report.problem
    assert report.num_requests == 3 * len(rollouts)
    stats = audit_stats(audit_files(tmp_path))
    assert (stats["requests"], stats["ids"]) == (3 * len(rollouts), len(rollouts))
    code, said = command("audit", "show", tmp_path, "r2")
    assert code == 0
    assert "was served 3 times: choose by --serving N" in said
    code, said = command("audit", "show", tmp_path, "r2", "--serving", 3)
    assert code == 0
    tokens = len(rollouts["r2"].token_ids)
    assert f"request r2, {tokens} tokens" in said
    assert command("audit", "show", tmp_path, "r2", "--serving", 4)[0] == 2


def test_show_lists_what_there_is_and_one_rollout_with_its_prompt(policy, tmp_path):
    rollouts = serve(policy, AuditWriter(tmp_path))
    code, said = command("audit", "show", tmp_path)
    assert code == 0
    for name, rollout in rollouts.items():
        start = " ".join(map(str, rollout.request.prompt_ids))[:12]
        assert f"{name} 1 {len(rollout.token_ids)} 0 " in said
        assert start in said
    code, said = command("audit", "show", tmp_path, "r1")
    assert code == 0
    assert "prompt " + " ".join(map(str, rollouts["r1"].request.prompt_ids)) in said
    assert "accepted" in said
    code, said = command("audit", "show", tmp_path, "r11")
    assert code == 2
    assert "did you mean 'r1'?" in said
    assert "5 more; --limit N" in command("audit", "show", tmp_path, "--limit", 1)[1]


def honest(num_rows, *, seed=0):
    """Rows whose coins and uniforms are independent, a request of 100 rows each."""
    generator = np.random.default_rng(seed)
    numbers = np.zeros(num_rows, dtype=NUMBERS)
    numbers["position"] = np.arange(num_rows) % 100
    numbers["attempt"] = numbers["position"]
    numbers["coin"], numbers["uniform"] = generator.random(num_rows), generator.random(num_rows)
    starts = np.arange(0, num_rows, 100)
    requests = [
        AuditedRequest(
            name=f"r{start}",
            session="s",
            pool_id="p",
            info={"seed": int(start), "prompt_ids": [1], "prefix_ids": []},
            numbers=numbers[start : start + 100],
            files=["file"],
            file_indices=np.zeros(100, dtype=int),
            row_indices=np.arange(start, start + 100),
        )
        for start in starts
    ]
    return AuditRows(
        requests=requests, numbers_N=numbers, serving_N=np.arange(num_rows) // 100, starts_S=starts
    )


def test_coins_that_meet_by_chance_are_no_finding_and_one_more_than_chance_is():
    bits, num_rows = 32, 100_000
    rows = honest(num_rows)
    found = np.unique(np.floor(np.append(rows.numbers_N["coin"], rows.numbers_N["uniform"]) * 2.0**bits))
    num_pairs = 2 * num_rows - len(found)
    limit = equal_coins_limit(2 * num_rows, bits=bits)
    assert 0 < num_pairs <= limit
    assert _equal_coins(rows, bits=bits) is None
    planted = limit - num_pairs + 1
    rows.numbers_N["coin"][1000 : 1000 + 200 * planted : 200] = rows.numbers_N["uniform"][
        300 : 300 + 200 * planted : 200
    ]
    problem = _equal_coins(rows, bits=bits)
    assert problem is not None
    assert "more than chance explains" in problem.what


@pytest.mark.parametrize("bits", [24, 28, 32])
def test_the_limit_holds_for_honest_coins_of_any_seed(bits):
    exceeded = 0
    for seed in range(60):
        coins = np.random.default_rng(seed).integers(0, 2**bits, 40_000)
        _, count = np.unique(coins, return_counts=True)
        exceeded += int((count * (count - 1) // 2).sum()) > equal_coins_limit(len(coins), bits=bits)
    assert exceeded <= 1
    assert equal_coins_limit(60_000_000) >= 1


@pytest.mark.parametrize("within_one_request", [True, False])
def test_a_coin_that_serves_twice_is_found_whatever_its_bits(within_one_request):
    rows = honest(1000)
    assert _equal_coins(rows) is None
    rows.numbers_N["coin"][420 if within_one_request else 620] = rows.numbers_N["uniform"][410]
    problem = _equal_coins(rows)
    assert problem is not None
    assert "has served before" in problem.what


def test_a_copy_of_a_request_meets_the_same_coins_but_not_within_itself():
    rows = honest(200)
    rows.requests[1].info["seed"] = rows.requests[0].info["seed"]
    for name in ("coin", "uniform"):
        rows.numbers_N[name][100:] = rows.numbers_N[name][:100]
    assert _equal_coins(rows) is None
    # The same word again in one request: its count of forwards stood still.
    for name in ("coin", "attempt", "position"):
        rows.numbers_N[name][1] = rows.numbers_N[name][0]
    assert _equal_coins(rows) is not None


def test_a_disk_that_is_full_is_named_and_costs_no_row(policy, tmp_path):
    folder = tmp_path / "audit"
    folder.write_text("in the way")
    writer = AuditWriter(folder)
    with pytest.raises(AuditError, match=r"rows of the audit could not be written to .*audit"):
        serve(policy, writer)
    with pytest.raises(AuditError):
        writer.flush()
    folder.unlink()
    writer.flush()
    report = check_audit(audit_files(folder), policy_of=lambda version: policy)
    assert report.problem is None, report.problem
    assert report.num_requests == 6
    assert not list(folder.glob(".*"))


def without(name):
    return lambda table: table.drop_columns([name])


def with_nulls(table):
    coins = table["coin"].to_pylist()
    coins[3] = None
    where = table.schema.get_field_index("coin")
    return table.set_column(where, "coin", pa.array(coins, type=pa.float64()))


def as_text(table):
    where = table.schema.get_field_index("token")
    return table.set_column(where, "token", pa.array(["x"] * len(table)))


def of_another_schema(table):
    return table.replace_schema_metadata({"blockroll_audit": "7"})


def of_no_schema(table):
    return table.replace_schema_metadata(None)


def info_cut_with_checksum(table):
    infos = [info and info[:40] for info in table["request_info"].to_pylist()]
    numbers = np.zeros(len(table), dtype=NUMBERS)
    for name in NUMBERS.names:
        numbers[name] = table[name].to_numpy()
    checksums = pa.array(row_checksums(table["request"].to_pylist(), numbers, infos), type=pa.uint32())
    for name, values in (("request_info", pa.array(infos)), ("checksum", checksums)):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table


TABLES = {
    "lacks coin": without("coin"),
    "lacks request_info": without("request_info"),
    "coin are not there in every row": with_nulls,
    "cannot be read": as_text,
    "has audit schema 7": of_another_schema,
    "has audit schema none": of_no_schema,
    "request_info is damaged": info_cut_with_checksum,
}
BYTES = {
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "not parquet": lambda data: b"some text\n" * 50,
    "its end lost": lambda data: data[:-9],
}


@pytest.fixture
def one_file(policy, tmp_path):
    serve(policy, AuditWriter(tmp_path))
    (path,) = audit_files(tmp_path)
    return path


@pytest.mark.parametrize("what", TABLES)
def test_a_file_of_another_form_is_one_line_that_names_it(one_file, what):
    table = TABLES[what](pq.read_table(one_file))
    pq.write_table(table, one_file)
    for name in ("check", "show", "stats"):
        if (name, what) == ("stats", "request_info is damaged"):
            continue  # it reads no info
        code, said = command("audit", name, one_file.parent)
        assert code == 2, (name, said)
        assert said.startswith("Error: ")
        assert one_file.name in said
        assert what in said


@pytest.mark.parametrize("damage", BYTES)
def test_a_damaged_file_is_one_line_that_names_it(one_file, damage):
    one_file.write_bytes(BYTES[damage](one_file.read_bytes()))
    with pytest.raises(InvalidInput, match="cannot be read as an audit file"):
        read_audit(one_file)
    code, said = command("audit", "check", one_file.parent)
    assert code == 2
    assert said.startswith("Error: ")
    assert one_file.name in said


def test_no_flipped_bit_goes_unnoticed_that_changes_a_row(one_file):
    data, whole = one_file.read_bytes(), read_audit(one_file)
    generator = np.random.default_rng(0)
    for place in generator.integers(4, len(data) - 8, 60).tolist():
        one_file.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        code, said = command("audit", "check", one_file.parent, "--level", 1, "--json")
        if code == 0:
            after = read_audit(one_file)
            assert after.requests == whole.requests
            assert after.infos == whole.infos
            assert after.numbers_N.tobytes() == whole.numbers_N.tobytes()
        else:
            assert code in (1, 2), said
            assert one_file.name in (said if code == 2 else json.loads(said)["problem"]["file"])


def test_a_cut_that_rounding_moves_is_no_finding_and_another_cut_is_one(policy, tmp_path):
    """Another machine rounds otherwise: the token at the edge of top_p may be in on one, out on the other."""
    (prompt, *_) = prompts(1)
    requests = make_requests([prompt] * 30, Sampling(max_tokens=1))
    (plain, *_) = run(policy, requests[:1], Plan(0), max_batch_size=1).values()
    assert plain.token_ids
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        probs = policy.model(ids).logits[0, -1].double().softmax(-1).sort(descending=True).values
    edge = float(probs[:3].sum())
    writer = AuditWriter(tmp_path)
    sampling = Sampling(max_tokens=1, top_p=edge * (1 + 2e-5))  # the fourth token is in
    run(policy, make_requests([prompt] * 30, sampling), Plan(0), observers=(writer,), max_batch_size=4)
    writer.flush()
    (path,) = audit_files(tmp_path)
    assert check_audit([path], policy_of=lambda version: policy).passed
    for top_p, passes in ((edge * (1 - 2e-5), True), (edge - 0.05, False)):
        rewrite_infos(path, lambda info, top_p=top_p: info["sampling"].update(top_p=top_p))
        report = check_audit([path], policy_of=lambda version: policy)
        assert report.passed is passes, report.problem


def rewrite_infos(path, change):
    """As a careful forger does: checksums are right again."""
    table = pq.read_table(path)
    infos = [info and json.loads(info) for info in table["request_info"].to_pylist()]
    for info in infos:
        if info:
            change(info)
    texts = [info and json.dumps(info) for info in infos]
    file = read_audit(path)
    checksums = pa.array(row_checksums(file.requests, file.numbers_N, texts), type=pa.uint32())
    for name, values in (("request_info", pa.array(texts)), ("checksum", checksums)):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)
