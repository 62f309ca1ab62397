"""The service, container and example files agree with the daemon they configure."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from dockerfile import DOCKERFILE, dockerfile_instruction, health_check
from packaging.requirements import Requirement

from clevrd import config
from clevrd.config import BY_FIELD
from clevrd.errors import CannotStart, ConfigError, NotAllowedHere
from clevrd.sources.settings import SourceEntry
from clevrd.tenants.settings import Auth, Key, TenantEntry, read_access
from clevrd.tls.settings import CertificateEntry, TlsSettings
from clevrd.webhooks.settings import WebhookEntry

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd" / "clevrd.service"
EXAMPLE = ROOT / "systemd" / "clevrd.toml"
TLS_FIELDS = ("tls_cert_file", "tls_key_file")
COMPOSE = ROOT / "docker-compose.yml"
KUBERNETES = ROOT / "deploy" / "kubernetes" / "clevrd.yaml"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def unit_value(name: str) -> str:
    """Return what the unit sets ``name`` to; it is set exactly once."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return str(value)


def compose_value(name: str) -> str:
    """Return what the compose file sets ``name`` to; it is set exactly once."""
    (value,) = re.findall(rf'^ +{name}: "?([^"\n]*)"?$', COMPOSE.read_text(), re.MULTILINE)
    return str(value)


def compose_environment() -> dict[str, str]:
    """Return the variables that the compose file gives the daemon."""
    (text,) = re.findall(r"^  clevrd:\n((?:    .*\n)+)", COMPOSE.read_text(), re.MULTILINE)
    (block,) = re.findall(r"^    environment:\n((?: {6}.*\n)+)", text, re.MULTILINE)
    return dict(re.findall(r'^ +([^#\s]+): "(.*)"$', block, re.MULTILINE))


def unit_environment() -> dict[str, str]:
    """Return the variables that the unit gives the daemon."""
    return dict([unit_value("Environment").split("=", 1)])


def dockerfile_environment() -> dict[str, str]:
    """Return the variables that the image gives the daemon, less those meant for Python."""
    pairs = (pair.split("=", 1) for pair in dockerfile_instruction("ENV").split())
    return {name: value for name, value in pairs if name not in {"PATH", "PYTHONUNBUFFERED"}}


def kubernetes_environment() -> dict[str, str]:
    """Return the variables that the StatefulSet gives the daemon."""
    found = re.findall(
        r"^ +- \{name: ([A-Z_]+), value: (.+)\}$", KUBERNETES.read_text(), re.MULTILINE
    )
    return {name: value.strip('"') for name, value in found}


def tool(name: str) -> str:
    """Return the path of a tool that is installed with these tests; skip, or fail in CI."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        reason = f"there is no {name}; it is in clevrd[dev]"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def fields_of(shape: type[msgspec.Struct]) -> set[str]:
    """Return the names of the fields that a table may have."""
    return {field.name for field in msgspec.structs.fields(shape)}


def said_by(*command: str | Path) -> tuple[int, str]:
    """Return the exit code and the output of a tool."""
    done = subprocess.run(
        [tool(str(command[0])), *map(str, command[1:])], capture_output=True, text=True, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def runnable_unit(tmp_path: Path) -> Path:
    """Return a copy of the unit that starts a program which this machine has."""
    command = unit_value("ExecStart")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(command.split()[0], sys.executable))
    return copy


@needs_systemd
def test_unit_is_accepted_by_systemd(runnable_unit: Path) -> None:
    """No misspelt directive, no value that systemd would ignore with a warning."""
    done = subprocess.run(
        ["systemd-analyze", "verify", runnable_unit], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_lines_for_credentials_are_accepted_by_systemd(runnable_unit: Path) -> None:
    """Those that hand over certificates and keys are comments until somebody has such files."""
    text = runnable_unit.read_text()
    lines = re.findall(r"^#((?:LoadCredential|Environment)=.*)$", text, re.MULTILINE)
    for line in lines:
        text = text.replace(f"#{line}\n", f"{line}\n")
    runnable_unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", runnable_unit], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")
    names = re.findall(r"^LoadCredential=([a-z.]+):/etc/", text, re.MULTILINE)
    assert len(names) == 4
    (variables,) = [line for line in lines if line.startswith("Environment=")]
    given = dict(pair.split("=") for pair in variables.removeprefix("Environment=").split())
    assert given.keys() == {BY_FIELD[field].prefixed_env for field in TLS_FIELDS}
    assert {value.removeprefix("%d/") for value in given.values()} <= set(names)


@needs_systemd
def test_unit_stays_hardened(runnable_unit: Path) -> None:
    """systemd's own score of what is exposed, 0 to 10, stays at 1.0 or less."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=10", runnable_unit],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout


def test_unit_does_not_retry_what_cannot_heal() -> None:
    """Bad usage (argparse's 2), no permission and bad configuration end it at the first start."""
    never_retried = {int(code) for code in unit_value("RestartPreventExitStatus").split()}

    assert never_retried == {2, NotAllowedHere.exit_code, ConfigError.exit_code}
    assert CannotStart.exit_code not in never_retried
    assert unit_value("StartLimitIntervalSec") == "0"


def test_supervisors_wait_longer_than_the_daemon_drains() -> None:
    """Nobody kills a daemon that is still within the time it gives itself to stop."""
    drain_s = config.Config().shutdown_timeout_s

    assert int(unit_value("TimeoutStopSec")) > drain_s
    assert float(compose_environment()["CLEVRD_SHUTDOWN_TIMEOUT_S"]) == drain_s
    assert int(compose_value("stop_grace_period").removesuffix("s")) > drain_s


@pytest.mark.parametrize(
    "environment",
    [compose_environment, unit_environment, dockerfile_environment, kubernetes_environment],
)
def test_variables_are_read_by_the_daemon(environment: Callable[[], dict[str, str]]) -> None:
    """A variable that nobody reads is a setting somebody believes in."""
    variables = environment()

    read = {setting.env for setting in config.SETTINGS} | config.OTHER_VARIABLES

    assert variables
    assert variables.keys() <= read


@pytest.mark.parametrize("environment", [compose_environment, dockerfile_environment])
def test_container_values_are_the_defaults(environment: Callable[[], dict[str, str]]) -> None:
    """The files show where to turn; turning is left to who deploys.

    Only the compose file's daemon has a listener for operators: Prometheus asks it from another
    container.
    """
    variables = environment()
    admin_address = variables.pop("CLEVRD_ADMIN_ADDRESS", "")
    loaded = config.load({}, variables, None)

    assert admin_address == (":8081" if environment is compose_environment else "")
    assert loaded.config == config.Config()
    assert loaded.warnings == []


def test_container_memory_leaves_room_for_the_rings() -> None:
    """Full rings alone don't reach the 80 % of the container's memory where throttling begins."""
    limit_mb = int(compose_value("mem_limit").removesuffix("m"))

    assert int(compose_environment()["MAX_MEMORY_MB"]) <= 0.8 * limit_mb


def test_container_exposes_the_port_it_listens_on() -> None:
    """EXPOSE, the published port and the daemon's address are the same number."""
    port = dockerfile_environment()["ADDRESS"].removeprefix(":")

    assert dockerfile_instruction("EXPOSE") == port
    assert f'- "127.0.0.1:{port}:{port}"' in COMPOSE.read_text()


def test_compose_file_is_one() -> None:
    """By the schema of the Compose Specification, in which no unknown key stands."""
    code, said = said_by("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)

    assert code == 0, said


def test_containers_are_read_only_and_pinned() -> None:
    """Each service, the ones that are only looked at too."""
    text = COMPOSE.read_text()
    services = re.findall(r"^  ([a-z]+):\n((?:    .*\n|\n)+)", text, re.MULTILINE)

    assert [name for name, _ in services] == ["clevrd", "prometheus", "grafana"]
    for name, block in services:
        assert "    read_only: true\n" in block, name
        assert "    cap_drop: [ALL]\n" in block, name
        assert '    security_opt: ["no-new-privileges:true"]\n' in block, name
        assert re.search(r"    build: \.\n|    image: \S+:v?\d+\.\d+\.\d+\n", block), name
        for port in re.findall(r'"([\d.:]+:\d+)"', block):
            assert port.startswith("127.0.0.1:"), name
    for path in re.findall(r"- (\./\S+?):/\S+:ro$", text, re.MULTILINE):
        assert (ROOT / path).is_dir(), path


def test_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    """Not even of style."""
    assert said_by("hadolint", DOCKERFILE) == (0, "")


def test_image_has_the_extras_that_it_says() -> None:
    """Those that `make lock` pins: tokens, traces, journals in Redis, certificates for a try."""
    extras = re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text())
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )

    assert extras == ["jwt", "otel", "redis", "tls"]
    assert "extras jwt, otel, redis and tls" in DOCKERFILE.read_text()
    for extra in extras:
        for requirement in map(Requirement, tables["optional-dependencies"][extra]):
            assert requirement.specifier.contains(pins[requirement.name]), requirement


# --- Kubernetes ------------------------------------------------------------------------------


def test_kubernetes_objects_are_ones() -> None:
    """By the schemas of Kubernetes, in which no unknown field stands."""
    code, said = said_by("kubernetes-validate", "--strict", KUBERNETES)

    assert code == 0, said
    for kind in ("service/clevrd-events", "statefulset/clevrd", "poddisruptionbudget/clevrd"):
        assert f"passed for resource {kind}" in said, said


def test_pod_is_given_what_the_daemon_needs() -> None:
    """The image's user and ports, memory above the daemon's, and time to stop."""
    text = KUBERNETES.read_text()
    environment = kubernetes_environment()
    user, _, group = dockerfile_instruction("USER").partition(":")
    (limit_mib,) = re.findall(r"limits: \{memory: (\d+)Mi\}", text)
    (grace_s,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)

    assert f"runAsUser: {user}\n" in text
    assert f"fsGroup: {group}\n" in text
    port = dockerfile_environment()["ADDRESS"].removeprefix(":")
    assert f"{{name: http, containerPort: {port}}}" in text
    assert f"{{name: admin, containerPort{environment['CLEVRD_ADMIN_ADDRESS']}" in text.replace(
        "containerPort: ", "containerPort:"
    )
    assert int(environment["MAX_MEMORY_MB"]) <= 0.8 * int(limit_mib)
    assert int(grace_s) > config.Config().shutdown_timeout_s
    assert f"mountPath: {environment['CLEVRD_STATE_DIR']}}}" in text
    # With the name of the daemon's variables a service would set some of them in each pod.
    assert not re.search(
        r"^  name: clevrd$(?=(?:\n.*){0,3}\nspec:\n  (?:ports|clusterIP))", text, re.M
    )


def test_compose_checks_health_as_the_image_does() -> None:
    """There is one health check, written down twice: not every tool takes it from the image."""
    (test,) = re.findall(r"^      test: (.*)$", COMPOSE.read_text(), re.MULTILINE)

    assert json.loads(test) == ["CMD", *health_check()[2:]]


@pytest.mark.parametrize(
    ("lock", "table", "key"),
    [
        (ROOT / "requirements.lock", "project", "dependencies"),
        (ROOT / "requirements-build.lock", "build-system", "requires"),
    ],
    ids=["dependencies", "build"],
)
def test_image_is_built_from_pinned_files_that_fit(lock: Path, table: str, key: str) -> None:
    """Each requirement is there with one version that it allows, by hash; `make lock` renews it."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())[table][key]
    pin = r"^([a-z0-9-]+)==(\S+)((?: \\\n +--hash=sha256:\w{64})+)$"
    pins = re.findall(pin, lock.read_text(), re.MULTILINE)
    versions = {name: version for name, version, _ in pins}

    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[requirement.name]), requirement
    lines = [line for line in lock.read_text().splitlines() if "==" in line]
    assert len(pins) == len(lines)


def test_image_installs_nothing_that_is_not_pinned() -> None:
    """Every install says which files it takes, and the base says which version it is."""
    text = DOCKERFILE.read_text().replace("\\\n", "")
    installs = re.findall(r"\bpip (?:--python \S+ )?install\b[^&\n]*", text)

    assert installs
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "clevrd-*.whl" in install
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert re.search(r":3\.12\.\d+-slim-bookworm", base)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}


def test_build_is_given_every_module_and_names_no_folder_that_is_gone() -> None:
    """A folder of modules that .dockerignore does not name is missing in the image."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "clevrd").rglob("*.py")}

    named = re.findall(r"^!(\S+)/\*\.py$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)

    assert sorted(named) == sorted(map(str, folders))


def test_build_is_given_each_page_by_its_name() -> None:
    """A pattern would let in what lies beside them."""
    served = {f"clevrd/web/{path.name}" for path in (ROOT / "clevrd" / "web").iterdir()}

    named = re.findall(r"^!(clevrd/web/\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)

    assert sorted(named) == sorted(name for name in served if not name.endswith("__pycache__"))


def test_example_shows_every_setting_with_its_default() -> None:
    """`#name = value` is a setting as it is; `# ` begins prose."""
    text = EXAMPLE.read_text()

    shown = tomllib.loads(re.sub(r"^#(?=[a-z])", "", text, flags=re.MULTILINE))

    assert shown == {setting.field: setting.default for setting in config.SETTINGS}


def test_example_has_every_field_of_the_tables() -> None:
    """Who takes the signs away has tables that are read, and finds each field that there is."""
    text = re.sub(
        r"^#.?(?=\[.*\]$|\"?[a-z0-9_.]+\"? = )", "", EXAMPLE.read_text(), flags=re.MULTILINE
    )

    tables = tomllib.loads(text)

    # Read as the daemon reads them: a mistake of spelling or of kind is refused.
    read_access({name: tables[name] for name in ("auth", "tenants")}, "the example")
    (webhook,) = msgspec.convert(tables["webhooks"], list[WebhookEntry])
    (source,) = msgspec.convert(tables["sources"], list[SourceEntry])
    tls = msgspec.convert(tables["tls"], TlsSettings)
    assert (webhook.tenant, source.name, len(tls.certificates)) == ("acme", "orders", 1)
    for shape, table in (
        (WebhookEntry, tables["webhooks"][0]),
        (SourceEntry, tables["sources"][0]),
        (TlsSettings, tables["tls"]),
        (CertificateEntry, tables["tls"]["certificates"][0]),
        (Auth, tables["auth"]),
    ):
        assert fields_of(shape) == set(table)
    tenant, key = tables["tenants"][0], tables["tenants"][0]["keys"][0]
    # A certificate of a client is in docs/operations.md, and so are the limits of a key.
    assert fields_of(TenantEntry) - set(tenant) == {"client_certificates"}
    assert fields_of(Key) - set(key) == {"publish_rate_per_s", "publish_burst", "max_connections"}


def test_example_changes_nothing_as_it_is() -> None:
    """Installed unread, the example leaves every default where it was."""
    loaded = config.load({}, {}, str(EXAMPLE))

    assert loaded.config == config.Config()
    assert set(loaded.sources.values()) == {"default"}
