"""What docker/ says, held against what is there: instruction by instruction, service by service, command by command.

No container engine is needed. docs/docker.md says what was built with one.
"""

import importlib.util
import json
import os
import re
import shlex
import ssl
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from wardround.common.cli import wardround
from wardround.common.supervisor import exclusive
from wardround.server.certificates import make_authority, make_server

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
SCRIPTS = sorted((DOCKER / "demo").glob("*.sh"))
KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "VOLUME", "USER", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
SECRET = re.compile(r"secret|token|passw|passphrase|credential|api_?key|private", re.IGNORECASE)
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
SITE_TOML = "/var/lib/wardround/site/site.toml"


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, the rest of it) of a Dockerfile; comments dropped, continued lines joined."""
    lines = [
        line for line in file.read_text("utf-8").splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(head, rest.strip()) for head, _, rest in (line.partition(" ") for line in joined.splitlines())]


def of(file: Path, name: str, *, last_stage: bool = False) -> list[str]:
    found = instructions(file)
    if last_stage:
        found = found[max(i for i, (head, _) in enumerate(found) if head == "FROM") :]
    return [rest for head, rest in found if head == name]


def environment(file: Path) -> dict[str, str]:
    """ENV of the stage that runs."""
    return dict(word.split("=", 1) for rest in of(file, "ENV", last_stage=True) for word in shlex.split(rest))


def pip_installs(file: Path) -> list[list[str]]:
    """The words of every `pip install` in a Dockerfile."""
    return [
        command.split()
        for rest in of(file, "RUN")
        for command in re.split(r";|\bthen\b|\*\)", rest)
        if re.search(r"\bpip\d? install\b", command)
    ]


def ignored(path: str) -> bool:
    """Whether .dockerignore, a list of what is let through, keeps a path of the checkout from a build."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    return not any(path == one[1:] or path.startswith(one[1:] + "/") for one in patterns if one.startswith("!"))


def resolve(words: list[str]) -> click.Command:
    """The command that `wardround WORDS` runs; every option, choice and number of arguments is checked by click."""
    command: click.Command = wardround
    context = click.Context(command, info_name="wardround")
    rest = list(words)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no command '{name}' in wardround {shlex.join(words)}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    command.parse_args(context, rest)
    return command


def loaded(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def services(*files: Path) -> list[Any]:
    return [
        pytest.param(file, name, service, id=f"{file.stem}:{name}")
        for file in files or COMPOSE
        for name, service in loaded(file)["services"].items()
    ]


def dockerfile_of(service: dict[str, Any]) -> Path:
    path = DOCKER / service["build"]["context"] / service["build"]["dockerfile"]
    assert path.resolve() in [file.resolve() for file in DOCKERFILES]
    return path


def command_of(service: dict[str, Any]) -> list[str]:
    """What a service runs: its own entrypoint and command, else those of its image."""
    file = dockerfile_of(service)
    entry = service.get("entrypoint") or json.loads(of(file, "ENTRYPOINT")[-1])
    return [*entry, *(service.get("command") or json.loads(of(file, "CMD")[-1]))]


def mounted(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Path in the container → (what is mounted there, whether read-only)."""
    found: dict[str, tuple[str, bool]] = {}
    for text in service.get("volumes", ()):
        source, target = re.fullmatch(r"(\$\{[^}]*\}|[^:]+):(.+)", text).groups()  # type: ignore[union-attr]
        found[target.removesuffix(":ro")] = (source, target.endswith(":ro"))
    return found


# ---- Dockerfiles


def test_there_is_an_image_for_each_role_and_a_compose_file_for_a_host_and_for_a_hospital() -> None:
    assert [file.name for file in DOCKERFILES] == ["client.Dockerfile", "server.Dockerfile"]
    assert [file.name for file in COMPOSE] == ["compose.site.yaml", "compose.yaml"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
class TestDockerfile:
    def test_it_has_only_instructions_that_every_builder_knows(self, file: Path) -> None:
        assert {head for head, _ in instructions(file)} <= KNOWN  # no ADD: nothing is fetched by a URL

    def test_its_base_is_pinned_by_a_tag(self, file: Path) -> None:
        bases = [rest.removeprefix("BASE=") for rest in of(file, "ARG") if rest.startswith("BASE=")]
        assert len(bases) == 1 and re.fullmatch(r"[a-z/]+:\d[\w.-]+", bases[0]), bases
        stages = {rest.split(" AS ")[1] for rest in of(file, "FROM") if " AS " in rest}
        assert {rest.split(" AS ")[0] for rest in of(file, "FROM")} <= {"${BASE}", *stages}

    def test_it_runs_as_a_fixed_user_that_is_not_root(self, file: Path) -> None:
        heads = [head for head, _ in instructions(file)]
        assert of(file, "USER") == ["10001:10001"]
        assert heads.index("USER") < heads.index("ENTRYPOINT")
        assert "RUN" not in heads[heads.index("USER") :] and "COPY" not in heads[heads.index("USER") :]
        assert "--uid 10001" in of(file, "RUN", last_stage=True)[-1]

    def test_no_secret_is_in_a_layer(self, file: Path) -> None:
        named = [word.partition("=")[0] for head in ("ENV", "ARG") for rest in of(file, head) for word in rest.split()]
        assert named and not [name for name in named if SECRET.search(name)]
        assert "--mount=type=secret" not in file.read_text("utf-8")

    def test_everything_it_copies_is_there_and_reaches_the_build(self, file: Path) -> None:
        copied = [rest.split() for rest in of(file, "COPY")]
        sources = [source for words in copied if not words[0].startswith("--from") for source in words[:-1]]
        assert {"client", "common", "configs", "server", "simulations", "pyproject.toml"} <= set(sources)
        assert not [source for source in sources if not (ROOT / source).exists() or ignored(source)]

    def test_it_copies_all_that_the_wheel_is_built_from(self, file: Path) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
        needed = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
        needed |= {project["project"]["readme"], *project["project"]["license-files"]}
        assert needed <= {word for rest in of(file, "COPY") for word in rest.split()}

    def test_every_install_is_pinned_by_the_constraints(self, file: Path) -> None:
        installs = pip_installs(file)
        assert len(installs) >= 4
        assert not [shlex.join(words) for words in installs if ("-c", "constraints.txt") not in pairwise(words)]

    def test_its_torch_is_the_pinned_one(self, file: Path) -> None:
        (torch,) = (rest.removeprefix("TORCH=torch==") for rest in of(file, "ARG") if rest.startswith("TORCH="))
        assert torch.partition("+")[0] == PINNED["torch"]

    def test_its_entry_point_is_a_console_script_and_its_default_command_a_real_one(self, file: Path) -> None:
        entry, command = json.loads(of(file, "ENTRYPOINT")[-1]), json.loads(of(file, "CMD")[-1])
        assert entry[0] in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
        assert resolve([*entry[1:], *command]).name == "start"

    def test_nothing_is_looked_up_or_reported_from_within(self, file: Path) -> None:
        expected = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        assert expected.items() <= environment(file).items()

    def test_all_that_is_written_goes_to_declared_volumes(self, file: Path) -> None:
        volumes = json.loads(of(file, "VOLUME", last_stage=True)[0])
        made = next(rest for rest in of(file, "RUN", last_stage=True) if "install -d" in rest)
        assert all(volume in made for volume in volumes)  # so that a new named volume belongs to the user
        caches = {name: value for name, value in environment(file).items() if "CACHE" in name or name == "HF_HOME"}
        assert len(caches) >= 3
        assert all(value.startswith("/var/cache/wardround") for value in caches.values())
        assert "/var/cache/wardround" in volumes and of(file, "WORKDIR", last_stage=True)[0] in volumes


def test_nothing_but_the_port_that_hospitals_dial_is_exposed() -> None:
    assert of(DOCKER / "client.Dockerfile", "EXPOSE") == []
    assert of(DOCKER / "server.Dockerfile", "EXPOSE") == ["9092"]


@pytest.mark.parametrize("path", [".git", ".venv", "runs", "data", "tests", "docker/compose.yaml", "site.toml"])
def test_what_an_image_does_not_need_never_reaches_a_build(path: str) -> None:
    assert ignored(path)


# ---- the coordinator's image without torch

WITHOUT_MODELS = "torch trl peft transformers opacus accelerate gguf pandas pyarrow sklearn safetensors tensorboard"
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT_MODELS.split()!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_the_packages_of_the_coordinator_without_torch_are_wardrounds_own_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    depends = {re.split(r"[<>=]", text)[0] for text in project["project"]["dependencies"]}
    lines = (DOCKER / "server.requirements.txt").read_text("utf-8").splitlines()
    named = {line for line in lines if line and not line.startswith("#")}
    assert named and named <= depends
    assert not named & {"torch", "trl", "peft", "transformers", "opacus", "accelerate"}


def test_everything_that_server_start_starts_is_imported_without_torch() -> None:
    modules = "deploy_cli", "deployment", "superlink", "keeper", "control", "app", "status", "certificates"
    code = f"{BLOCK}\nimport {', '.join(f'wardround.server.{name}' for name in modules)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_coordinator_is_founded_without_torch(tmp_path: Path) -> None:
    secret = tmp_path / "passphrase"
    secret.touch(0o600)
    secret.write_text("a passphrase of a test\n", "utf-8")
    words = ["server", "init", str(tmp_path / "coordinator"), "--consortium", "Light", "--address", "coordinator:9092"]
    code = f"{BLOCK}\nfrom wardround.common.cli import main\nmain({[*words, '--passphrase-file', str(secret)]!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "fingerprint" in done.stdout


def test_a_run_needs_the_image_with_torch() -> None:
    """Should this fail, a run no longer needs torch: say so in docs/docker.md and at the top of server.Dockerfile."""
    done = subprocess.run(
        [sys.executable, "-c", f"{BLOCK}\nimport wardround.server.warmup"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "ModuleNotFoundError" in done.stderr
    assert "ARG EXTRAS=finalize" in (DOCKER / "server.Dockerfile").read_text("utf-8")


# ---- compose files


@pytest.mark.parametrize(("file", "name", "service"), services())
class TestService:
    def test_its_command_is_one_that_exists(self, file: Path, name: str, service: dict[str, Any]) -> None:
        words = command_of(service)
        if words[0] == "sh":
            assert words[1].startswith("/demo/") and (DOCKER / "demo" / Path(words[1]).name).is_file()
        else:
            assert words[0] == "wardround" and resolve(words[1:]).name in ("start", "run")

    def test_it_is_hardened(self, file: Path, name: str, service: dict[str, Any]) -> None:
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert any(text.startswith("/tmp:") for text in service["tmpfs"])
        assert not {"privileged", "user", "pid", "ipc", "devices"} & set(service)

    def test_only_the_coordinator_publishes_a_port(self, file: Path, name: str, service: dict[str, Any]) -> None:
        published = service.get("ports", [])
        assert published == (["${WARDROUND_PORT:-9092}:9092"] if name == "coordinator" else [])
        assert service.get("network_mode") != "host"

    def test_every_volume_is_declared_and_every_bound_folder_is_there_or_asked_for(
        self, file: Path, name: str, service: dict[str, Any]
    ) -> None:
        for target, (source, _) in mounted(service).items():
            if source.startswith("./"):
                assert (DOCKER / source).is_dir() and mounted(service)[target][1]
            elif not source.startswith("${"):
                assert source in loaded(file)["volumes"]
        assert "/var/lib/wardround" in mounted(service)

    def test_its_secrets_are_in_no_variable(self, file: Path, name: str, service: dict[str, Any]) -> None:
        said = [*service.get("environment", {}), *service.get("build", {}).get("args", {})]
        assert not [word for word in said if SECRET.search(word)]
        assert "env_file" not in service

    def test_its_health_check_is_a_script_that_its_image_has(
        self, file: Path, name: str, service: dict[str, Any]
    ) -> None:
        lasts = service.get("restart") == "unless-stopped"
        assert lasts == ("healthcheck" in service)
        if lasts:
            kind, python, script, *arguments = service["healthcheck"]["test"]
            assert (kind, python) == ("CMD", "python")
            assert f"docker/health.py {script}" in of(dockerfile_of(service), "COPY")
            assert arguments == (["coordinator"] if name == "coordinator" else ["site", SITE_TOML])

    def test_it_has_time_to_stop_in_order(self, file: Path, name: str, service: dict[str, Any]) -> None:
        if service.get("restart") == "unless-stopped":
            assert service["stop_grace_period"] == ("90s" if name == "coordinator" else "2m")

    def test_what_it_waits_for_is_a_service(self, file: Path, name: str, service: dict[str, Any]) -> None:
        others = loaded(file)["services"]
        for other, how in service.get("depends_on", {}).items():
            assert other in others
            if how["condition"] == "service_healthy":
                assert "healthcheck" in others[other]
            else:
                assert how["condition"] == "service_completed_successfully" and others[other]["restart"] == "no"

    def test_its_build_arguments_are_known_to_its_dockerfile(
        self, file: Path, name: str, service: dict[str, Any]
    ) -> None:
        known = {rest.partition("=")[0] for rest in of(dockerfile_of(service), "ARG")}
        assert set(service["build"].get("args", {})) <= known


def test_the_demo_has_a_coordinator_and_four_hospitals_that_reach_nothing_else() -> None:
    content = loaded(DOCKER / "compose.yaml")
    hospitals = [name for name in content["services"] if re.fullmatch(r"site-\d\d", name)]
    assert len(hospitals) == 4 and content["networks"]["consortium"] == {"internal": True}
    assert all(content["services"][name]["networks"] == ["consortium"] for name in hospitals)
    assert content["services"]["coordinator-setup"]["command"] == hospitals
    assert all(content["services"][f"{name}-setup"]["network_mode"] == "none" for name in hospitals)


def test_no_hospital_of_the_demo_sees_anothers_folder_or_the_coordinators() -> None:
    for name, service in loaded(DOCKER / "compose.yaml")["services"].items():
        source, _ = mounted(service)["/var/lib/wardround"]
        assert source == ("coordinator" if name == "run" else name.removesuffix("-setup"))
        assert set(mounted(service)) <= {"/var/lib/wardround", "/var/cache/wardround", "/var/spool/wardround", "/demo"}


def test_the_run_is_asked_for_on_the_coordinators_own_loopback() -> None:
    run = loaded(DOCKER / "compose.yaml")["services"]["run"]
    assert run["network_mode"] == "service:coordinator" and run["profiles"] == ["run"]
    assert command_of(run)[:4] == ["wardround", "server", "run", "deploy-demo"]
    assert (ROOT / "configs" / "deploy-demo.toml").is_file()


def wardround_commands(text: str) -> list[list[str]]:
    """The words of every `wardround …` command of a shell script; fingerprints, read from files, stood for."""
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    commands = [re.split(r" \| | > ", line)[0] for line in lines if line.startswith("wardround ")]
    stood = [re.sub(r'"\$\(cat [^)]*\)"', "F", one).replace('"$@"', "--verified F") for one in commands]
    return [shlex.split(command)[1:] for command in stood]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_set_up_scripts_are_shell_and_call_commands_that_exist(script: Path) -> None:
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    assert all(resolve(words) for words in wardround_commands(script.read_text("utf-8")))


def test_the_set_up_is_that_of_the_deploy_demo_command_by_command() -> None:
    """simulations/deployment.py's `found`, with its start and its run: the same commands with the same options."""
    source = (ROOT / "simulations" / "deployment.py").read_text("utf-8")
    found = {tuple(pair) for pair in re.findall(r'"(server|client)",\s*"([a-z]+)"', source)}
    ours = {tuple(words[:2]) for script in SCRIPTS for words in wardround_commands(script.read_text("utf-8"))}
    ours |= {tuple(command_of(one)[1:3]) for one in loaded(DOCKER / "compose.yaml")["services"].values()}
    ours = {words for words in ours if words[0] in ("server", "client")}
    assert ours == found - {("server", "status")}
    options = {word for script in SCRIPTS for words in wardround_commands(script.read_text("utf-8")) for word in words}
    for option in ("--consortium", "--address", "--passphrase-file", "--name", "--table", "--dictionary", "--epsilon"):
        assert option in options and f'"{option}"' in source


@pytest.mark.parametrize("file", [*COMPOSE, ROOT / "docs" / "docker.md"], ids=lambda file: file.name)
def test_the_commands_that_people_are_told_to_type_exist(file: Path) -> None:
    """`docker compose … run --rm SERVICE ARGUMENTS` and `… exec SERVICE COMMAND`, in comments and in the document."""
    text = re.sub(r"\\\n#? *", "", file.read_text("utf-8"))
    told = re.findall(
        r"docker compose -f docker/(compose[\w.]*yaml) (run --rm|exec) (--entrypoint cp )?(\w[\w-]*)([^\n`#]*)", text
    )
    assert told
    for name, how, other, service, rest in told:
        one = loaded(DOCKER / name)["services"][service]
        words = shlex.split(re.split(r" {3,}", rest)[0])
        if how == "exec":
            assert words[0] == "wardround" and resolve(words[1:])
        elif words and not other:
            assert resolve([*json.loads(of(dockerfile_of(one), "ENTRYPOINT")[-1])[1:], *words])


# ---- the health check, for real


@pytest.fixture(scope="module")
def health() -> Any:
    """docker/health.py."""
    spec = importlib.util.spec_from_file_location("health", DOCKER / "health.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_coordinator_is_healthy_while_its_public_socket_answers(
    health: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_authority(tmp_path / "tls", "C")
    make_server(tmp_path / "tls", "coordinator")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "tls" / "server.pem", tmp_path / "tls" / "server.key")
    codes: list[int] = []
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        port = server.server_address[1]
        settings = f'consortium = "C"\naddress = "coordinator:{port}"\nlisten_port = {port}\nloopback_port = 1\n'
        (tmp_path / "coordinator.toml").write_text(settings, "utf-8")
        tmp_path.chmod(0o700)
        monkeypatch.setenv("WARDROUND_COORDINATOR", str(tmp_path))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for _Answers.status in (200, 503):
            codes.append(health.main(["coordinator"]))
        server.shutdown()
    codes.append(health.main(["coordinator"]))
    assert codes == [0, 1, 1]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"port {port}: answered 503" and said[1].startswith(f"port {port}: ") and len(said) == 2


class _Answers(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_hospital_is_healthy_while_all_its_processes_run(
    health: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site_toml = tmp_path / "site.toml"
    site_toml.write_text('name = "north"\ntable = "t.parquet"\ndictionary = "support_icu"\n', "utf-8")
    state = tmp_path / "state"
    state.mkdir()
    assert health.main(["site", str(site_toml)]) == 1
    with exclusive(state / "lock", "the site"):
        for pid, code in ((os.getpid(), 0), (None, 1)):
            processes = {"supernode": {"pid": os.getpid()}, "worker": {"pid": pid}}
            (state / "status.json").write_text(json.dumps({"processes": processes}), "utf-8")
            assert health.main(["site", str(site_toml)]) == code
    assert capsys.readouterr().err.splitlines() == ["is not started", "worker: not running now"]


def test_a_health_check_of_nothing_is_one_line_and_not_healthy(tmp_path: Path) -> None:
    script = [sys.executable, str(DOCKER / "health.py"), "site", str(tmp_path / "none.toml")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
