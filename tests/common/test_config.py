"""Configs: unknown keys refused, one clear line, overrides, and every TOML in the repository loads."""

from pathlib import Path

import pytest
from wardround.common import config
from wardround.common.errors import ConfigError

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


OFF = "name = 'x'\nprivacy.enabled = false\n"
ON = """name = 'x'
[federation]
validation_questions_per_site = 0
[privacy]
enabled = true
epsilon = 8.0
delta = 1e-5
max_grad_norm = 0.5
declared_patients = 900
"""


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    if path.name.startswith("coordinator"):
        assert config.load_coordinator(path).consortium
        return
    load = config.load_site if path.name.startswith("site") else config.load_run
    assert load(path).name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam = 'x'\n", "unknown key 'nam'|missing key 'name'"),
        (OFF + "[grpo]\ngroup_sizes = 7\n", "unknown key 'grpo.group_sizes'"),
        (
            OFF + "[grpo]\ngroup_size = 1\n",
            r"'grpo.group_size': .*greater than or equal to 2, got 1",
        ),
        (
            OFF + "[lora]\nstrategy = 'magic'\n",
            r"'lora.strategy': .*'ffa'.*got 'magic'",
        ),
        (OFF + "[federation]\nrounds = 0\n", r"'federation.rounds': .*got 0"),
        (
            OFF + "[federation]\nsecure_aggregation = 'off'\n",
            r"'bonawitz' or 'none', got 'off'",
        ),
        (OFF + "[federation]\ncolluders = 0\n", r"'federation.colluders': .*got 0"),
        (
            OFF + "[federation]\nupdate_range = 0.0\n",
            r"'federation.update_range': .*got 0",
        ),
        (OFF + "[federation]\nmax_weight = 0\n", r"'federation.max_weight': .*got 0"),
        (OFF + "[federation]\nmax_sites = 2\n", r"'federation.max_sites': .*got 2"),
        (
            OFF + "[federation]\nmax_sites = 1025\n",
            r"'federation.max_sites': .*got 1025",
        ),
        ("name = 'a/b'\n", "'name'"),
        (OFF + "[grpo]\nlearning_rate = nan\n", "'grpo.learning_rate'"),
        (
            OFF + "[grpo]\nexpectation = 'exact'\n[questions]\nreasoning_tokens = 9\n",
            "answer-only",
        ),
        (OFF + "[grpo]\nentropy_bonus = 0.5\n", "entropy_bonus is of expectation = 'exact' only"),
        (OFF + "[questions]\noption_order = 'random'\n", "'questions.option_order': .*'shuffled' or 'sorted'"),
        (OFF + "[simulation]\npartition = 'dirichlet'\n", "needs partition_feature"),
        ("name = \n", r"not valid TOML: .*line 1"),
        ("name = 2024-05-01\n", r"'name': .*string, got datetime\.date"),
    ],
)
def test_a_bad_config_gives_one_line_that_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.load_run(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run.toml") in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "least"),
    [("min_sites = 2", 3), ("colluders = 2", 4), ("min_sites = 4\ncolluders = 3", 5), ("min_sites = 65", 3)],
)
def test_fewer_sites_than_a_secure_sum_hides_are_refused(tmp_path: Path, settings: str, least: int) -> None:
    text = OFF + f"[federation]\n{settings}\n"
    with pytest.raises(ConfigError, match=f"expected min_sites from {least} to max_sites = 64, got"):
        config.load_run(write(tmp_path, text))
    assert config.load_run(write(tmp_path, text + "secure_aggregation = 'none'\n"))


def test_a_run_is_secure_unless_it_says_otherwise(tmp_path: Path) -> None:
    federation = config.load_run(write(tmp_path, OFF)).federation
    assert (federation.secure_aggregation, federation.colluders, federation.min_sites) == ("bonawitz", 1, 3)
    assert federation.weight_limit == 1
    patients = config.load_run(write(tmp_path, OFF + "[federation]\nweighting = 'patients'\n")).federation
    assert patients.weight_limit == patients.max_weight == 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[policy]\nmin_sites = 2\n", r"'policy.min_sites': .*got 2"),
        ("[policy]\ncolluders = 0\n", r"'policy.colluders': .*got 0"),
        ("[identity]\nroster_digest = 'AB'\n", r"'identity.roster_digest': .*got 'AB'"),
        ("[identity]\nverified = ['ABCD']\n", r"fingerprint: expected 8 groups of 4 .*, got 4 characters"),
        ("[identity]\npassphrase = 'correct horse'\n", "unknown key 'identity.passphrase'"),
    ],
)
def test_a_site_cannot_loosen_what_its_sums_rest_on(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text("name = 'north'\ntable = 't.csv'\ndictionary = 'smart'\n" + text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        config.load_site(path)


def test_a_site_verifies_nobody_and_lets_no_difference_be_seen_unless_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text("name = 'north'\ntable = 't.csv'\ndictionary = 'smart'\n", encoding="utf-8")
    site = config.load_site(path)
    assert (site.identity.verified, site.identity.roster_digest, site.policy.simulated) == ((), None, False)
    assert (site.policy.min_sites, site.policy.colluders, site.policy.repeat_with_others) == (3, 1, False)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        config.load_run(tmp_path / "nowhere.toml")


def test_overrides_are_typed_and_checked(tmp_path: Path) -> None:
    path = write(tmp_path, OFF)
    assert config.load_run(path, ["grpo.group_size=5", "lora.strategy=fedit"]).grpo.group_size == 5
    with pytest.raises(ConfigError, match=r"unknown key 'grpo\.groups'"):
        config.load_run(path, ["grpo.groups=5"])
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        config.load_run(path, ["grpo.group_size"])


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    first = config.load_run(write(tmp_path, OFF + "[warmup]\nadapter = 'smollm2-135m'\n"))
    assert config.load_run(write(tmp_path, config.to_toml(first))) == first
    assert config.RunConfig.from_json(first.to_json()) == first


def test_the_digest_covers_results_but_not_speed(tmp_path: Path) -> None:
    path = write(tmp_path, OFF)
    plain = config.load_run(path).digest()
    assert config.load_run(path, ["speed.micro_batch=1"]).digest() == plain
    assert config.load_run(path, ["seed=1"]).digest() != plain


def test_a_name_with_a_folder_before_it_is_not_a_shipped_config(tmp_path: Path) -> None:
    assert config.load_run(Path("demo")).name == "demo"
    with pytest.raises(ConfigError, match="no such file"):
        config.load_run(tmp_path / "demo")


def test_none_takes_away_an_optional_key_and_only_such(tmp_path: Path) -> None:
    path = write(tmp_path, OFF + "[warmup]\nadapter = 'smollm2-135m'\n")
    unset = ["warmup.adapter=none", "simulation.dictionary=none", "federation.server_learning_rate=none"]
    loaded = config.load_run(path, unset)
    assert loaded.warmup.adapter is loaded.simulation.dictionary is loaded.federation.server_learning_rate is None
    assert config.load_run(path, ["questions.mi_normalisation=none"]).questions.mi_normalisation == "none"
    assert config.load_run(path, ["warmup.adapter='none'"]).warmup.adapter == "none"
    with pytest.raises(ConfigError, match=r"'seed': .*got 'none'"):
        config.load_run(path, ["seed=none"])


def test_the_server_learning_rate_belongs_to_its_optimizer(tmp_path: Path) -> None:
    path = write(tmp_path, OFF)
    assert config.load_run(path).federation.eta == 1.0
    assert config.load_run(path, ["federation.server_optimizer=fedadam"]).federation.eta == 1e-3
    assert config.load_run(path, ["federation.server_learning_rate=0.5"]).federation.eta == 0.5


COORDINATOR = "consortium = 'c'\naddress = 'c.example.org:9092'\n"


def test_the_example_of_a_coordinator_has_every_key_and_the_defaults() -> None:
    example = config.read_toml(ROOT / "configs" / "coordinator.example.toml")
    assert set(example) == set(config.CoordinatorConfig.model_fields)
    defaults = config.CoordinatorConfig.model_validate({key: example[key] for key in ("consortium", "address")})
    chosen = {key: value for key, value in example.items() if key != "passphrase_file"}
    assert chosen == {key: value for key, value in defaults.model_dump().items() if key != "passphrase_file"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing key 'consortium'"),
        ("listen_prt = 1\n", "unknown key 'listen_prt'"),
        ("listen_port = 9093\n", "expected another port than listen_port"),
        ("loopback_port = 70000\n", "'loopback_port': .*got 70000"),
        ("max_body_bytes = 1000\n", "'max_body_bytes': .*got 1000"),
        ("max_connections = 100\n", "expected no more than max_connections"),
    ],
)
def test_a_wrong_coordinator_toml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(COORDINATOR + text if text else "", encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        config.load_coordinator(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_examples_in_the_docstrings_hold() -> None:
    import doctest

    assert doctest.testmod(config).failed == 0


def test_every_run_says_whether_it_is_private(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing key 'privacy'"):
        config.load_run(write(tmp_path, "name = 'x'\n"))
    with pytest.raises(ConfigError, match=r"missing key 'privacy.enabled'"):
        config.load_run(write(tmp_path, "name = 'x'\n[privacy]\nepsilon = 3.0\n"))
    assert config.load_run(write(tmp_path, ON)).privacy.enabled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("privacy.epsilon=none", "needs epsilon"),
        ("privacy.delta=none", "needs delta"),
        ("privacy.max_grad_norm=none", "needs max_grad_norm"),
        ("privacy.declared_patients=none", "needs declared_patients"),
        ("privacy.epsilon=0", "'privacy.epsilon': .*got 0"),
        ("privacy.epsilon=-1.0", "'privacy.epsilon': .*got -1"),
        ("privacy.delta=0.0", "'privacy.delta': .*got 0"),
        ("privacy.max_grad_norm=-0.5", "'privacy.max_grad_norm': .*got -0.5"),
        ("privacy.delta=2e-4", r"expected at most 1 / \(10 · declared_patients\) = 0.000111"),
        ("privacy.declared_patients=7", "'privacy.declared_patients': .*got 7"),
        ("grpo.loss_type=dapo", "'dr_grpo' or 'grpo', got 'dapo': it divides by the tokens of all patients"),
        ("grpo.loss_type=bnpo", "'dr_grpo' or 'grpo', got 'bnpo'"),
        ("federation.weighting=patients", "'uniform', got 'patients': a weight is a count"),
        ("federation.validation_questions_per_site=20", "expected 0, got 20"),
        ("grpo.patients_per_step=901", "fewer than grpo.patients_per_step"),
    ],
)
def test_a_private_run_that_would_not_be_private_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load_run(write(tmp_path, ON), [change])
