"""What deploy/ says is what exportd takes: its settings, commands, ports and metrics."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import grpc
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import exportd_server.app  # noqa: F401 - makes every metric known
from deploy import make_secrets
from exportd_server.addresses import host_and_port
from exportd_server.cli import main as command_line
from exportd_server.errors import ConfigurationError
from exportd_server.platform.metrics import REGISTRY
from exportd_server.settings import Settings, keys, load_settings, variable
from tests.support.command_line import parsed

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PAGES = [DEPLOY / "README.md", ROOT / "docs/upgrading.md", ROOT / "docs/backup.md"]
TEXTS = sorted(
    path
    for path in DEPLOY.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and "secrets" not in path.parts
)
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
}
"""What a metric's series are called after its name, by its type."""
AFTER_THE_DRAIN = 15.0
"""Seconds that a process may take to end after drain_timeout: records of the audit, the
connections, threads of drivers."""


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def manifests() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            for document in documents(path):
                yield path, document


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = (
        each
        for _, each in manifests()
        if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )
    return found


def pods() -> dict[str, dict[str, Any]]:
    """What runs in Kubernetes: a pod each, by its component."""
    found = {}
    for _, each in manifests():
        if "template" in each.get("spec", {}):
            template = each["spec"]["template"]
            component = template["metadata"]["labels"]["app.kubernetes.io/component"]
            found[component] = template["spec"]
    return found


def container(component: str) -> dict[str, Any]:
    (only,) = pods()[component]["containers"]
    assert isinstance(only, dict)
    return only


def services() -> dict[str, dict[str, Any]]:
    """Of compose.yaml, those that run exportd."""
    (compose,) = documents(DEPLOY / "compose.yaml")
    return {
        name: service
        for name, service in compose["services"].items()
        if service["image"].startswith("exportd:")
    }


def unit(path: Path) -> dict[str, list[str]]:
    """The settings of a unit, each with its values."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of exportd-server, and where it stands."""
    containerfile = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", containerfile, re.MULTILINE)
    (default,) = re.findall(r"^CMD (.+)$", containerfile, re.MULTILINE)
    yield "Containerfile", [*json.loads(entry), *json.loads(default)]
    for name, service in services().items():
        if "entrypoint" in service:
            continue
        yield f"compose.yaml, {name}", ["exportd-server", *service["command"]]
    for component in pods():
        yield f"kubernetes, {component}", ["exportd-server", *container(component)["args"]]
    for path in UNITS:
        (line,) = unit(path)["ExecStart"]
        yield path.name, ["exportd-server", *shlex.split(line)[1:]]
    for page in PAGES:
        blocks = re.findall(r"^```.*?^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for line in "\n".join(blocks).splitlines():
            # One in backquotes is told by an output, and not for the shell.
            if found := re.search(r"(?<!`)\bexportd-server (.+)", line):
                yield page.name, ["exportd-server", *shlex.split(found[1], comments=True)]


COMMANDS = list(commands())


# --- names


@pytest.mark.parametrize("path", [p for p in TEXTS if p.suffix == ".yaml"], ids=str)
def test_yaml_is_yaml(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


@pytest.mark.parametrize(
    "path", [*TEXTS, *PAGES[1:]], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_variable_is_a_setting(path: Path) -> None:
    known = {variable(key) for key in keys()} | {"EXPORTD_TOKEN", "EXPORTD_SERVER"}
    named = set(re.findall(r"\bEXPORTD_[A-Z0-9_]+\b", path.read_text()))
    assert named <= known


@pytest.mark.parametrize(("where", "arguments"), COMMANDS, ids=str)
def test_every_command_line_is_one(where: str, arguments: list[str]) -> None:
    assert parsed(command_line, arguments).command.name in arguments


def test_a_command_line_that_is_none_is_found() -> None:
    with pytest.raises(click.UsageError):
        parsed(command_line, ["exportd-server", "serve", "--no-worker"])
    with pytest.raises(click.UsageError):
        parsed(command_line, ["exportd-server", "keys", "make"])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_metric_exists(path: Path) -> None:
    known = {
        f"{metric.name}{suffix}"
        for metric in REGISTRY.collect()
        for suffix in SUFFIXES[metric.type]
    }
    named = re.findall(r"\bexportd_[a-z]+_[a-z_]+\b", path.read_text())
    assert set(named) <= known


def test_images_have_short_names() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    containerfile = (DEPLOY / "Containerfile").read_text()
    images = [
        *re.findall(r"^FROM (\S+)", containerfile, re.MULTILINE),
        *(service["image"] for service in compose["services"].values()),
        *(container(component)["image"] for component in pods()),
    ]
    assert len(images) > len(compose["services"])
    for image in images:
        first, slash, _ = image.partition("/")
        assert not (slash and re.search(r"[.:]", first)), image


# --- the image


def test_the_image_is_made_of_what_is_there_and_not_kept_out() -> None:
    containerfile = (DEPLOY / "Containerfile").read_text()
    sources = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", containerfile, re.MULTILINE)
        for source in line.split()
    }
    let_in = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sources == set(let_in)
    assert all((ROOT / source).exists() for source in sources)


def test_the_user_of_the_image_is_that_of_the_pods() -> None:
    containerfile = (DEPLOY / "Containerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\1$", containerfile, re.MULTILINE)
    assert f'"--uid", "{user}"' in containerfile
    for pod in pods().values():
        assert pod["securityContext"]["runAsUser"] == int(user) != 0


# --- settings


def given(
    monkeypatch: pytest.MonkeyPatch,
    environment: Mapping[str, str],
    file: Path,
    arguments: Sequence[str],
) -> Settings:
    """The settings of a process that is started that way; refused as it would be."""
    for name in os.environ:
        if name.startswith("EXPORTD_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    context = parsed(command_line, ["exportd-server", *arguments])
    flags = {k: v for k, v in context.params.items() if k not in _NOT_SETTINGS}
    serves = context.command.name == "serve"
    return load_settings(file, flags, serves=serves)


_NOT_SETTINGS = {"config", "log_level", "log_style"}


def in_compose(monkeypatch: pytest.MonkeyPatch, secrets: Path, name: str) -> Settings:
    service = services()[name]
    assert all(isinstance(value, str) for value in service["environment"].values())
    assert service["command"][-2:] == ["--config", "/run/secrets/exportd.toml"]
    file = secrets / "exportd.toml"
    return given(monkeypatch, service["environment"], file, service["command"])


def in_kubernetes(monkeypatch: pytest.MonkeyPatch, component: str) -> Settings:
    lines = (KUBERNETES / "settings.env").read_text().splitlines()
    environment = dict(
        line.split("=", 1) for line in lines if line and not line.startswith("#")
    )
    example = (KUBERNETES / "secret/exportd.toml.example").read_text()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "exportd.toml"
        file.write_text(example.replace('["KEY"]', f'["{"k" * 32}"]'))
        return given(monkeypatch, environment, file, container(component)["args"])


def test_the_example_of_secrets_has_no_key_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever forgets to put in one is told, instead of trusting one that all know."""
    file = KUBERNETES / "secret/exportd.toml.example"
    with pytest.raises(ConfigurationError, match="keys"):
        given(monkeypatch, {}, file, container("api")["args"])


def test_the_names_of_services_make_no_settings() -> None:
    """A Service called exportd would give every pod EXPORTD_PORT, which is no setting."""
    assert all(pod["enableServiceLinks"] is False for pod in pods().values())


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    make_secrets.make(tmp_path / "secrets")
    return tmp_path / "secrets"


def test_secrets_of_compose_belong_together_and_to_their_owner(secrets: Path) -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    named = {Path(each["file"]).name for each in compose["secrets"].values()}
    assert {path.name for path in secrets.iterdir()} == named
    assert secrets.stat().st_mode & 0o777 == 0o700
    settings = load_settings(secrets / "exportd.toml", {}, {})
    password = (secrets / "postgres_password").read_text()
    assert f":{password}@postgres:5432/" in settings.ledger.url.get_secret_value()
    accounts = json.loads((secrets / "s3_accounts.json").read_text())
    (account,) = accounts["identities"][0]["credentials"]
    assert settings.store.s3.secret_access_key is not None
    assert account == {
        "accessKey": settings.store.s3.access_key_id,
        "secretKey": settings.store.s3.secret_access_key.get_secret_value(),
    }
    with pytest.raises(FileExistsError):
        make_secrets.make(secrets)
    assert (secrets / "postgres_password").read_text() == password


def test_the_api_and_the_workers_of_compose_have_settings_of_one_fleet(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = in_compose(monkeypatch, secrets, "api")
    worker = in_compose(monkeypatch, secrets, "worker")
    assert not api.worker.enabled
    assert api.identity.required
    assert api.model_copy(update={"worker": worker.worker}) == worker


def test_the_api_and_the_workers_of_kubernetes_have_settings_of_one_fleet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api = in_kubernetes(monkeypatch, "api")
    worker = in_kubernetes(monkeypatch, "worker")
    assert not api.worker.enabled
    assert api.identity.required
    assert api.model_copy(update={"worker": worker.worker}) == worker


def test_only_what_is_needed_is_reached_from_outside() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    for service in compose["services"].values():
        for published in service.get("ports", []):
            assert published.startswith("127.0.0.1:"), published


# --- ports


def test_ports_agree_in_compose(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = in_compose(monkeypatch, secrets, "api")
    _, port = host_and_port("listen", settings.listen)
    api = services()["api"]
    assert api["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert api["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"
    (compose,) = documents(DEPLOY / "compose.yaml")
    s3 = compose["services"]["s3"]
    (option,) = (o for o in s3["command"] if o.startswith("-s3.port="))
    s3_port = option.partition("=")[2]
    assert settings.store.s3.endpoint_url == f"http://s3:{s3_port}"
    assert s3["ports"] == [f"127.0.0.1:{s3_port}:{s3_port}"]
    assert settings.store.s3.public_endpoint_url == f"http://localhost:{s3_port}"


def test_ports_agree_in_the_image() -> None:
    containerfile = (DEPLOY / "Containerfile").read_text()
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", containerfile, re.MULTILINE)
    _, port = host_and_port("listen", Settings.model_fields["listen"].default)
    assert int(exposed) == port
    assert f'default="127.0.0.1:{port}"' in (DEPLOY / "healthcheck.py").read_text()


def test_ports_agree_in_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = in_kubernetes(monkeypatch, "api")
    _, port = host_and_port("listen", settings.listen)
    _, metrics = host_and_port("metrics.listen", settings.metrics.listen)
    ports = {
        component: {each["name"]: each["containerPort"] for each in c.get("ports", [])}
        for component, c in ((name, container(name)) for name in pods())
    }
    assert ports == {
        "api": {"grpc": port, "metrics": metrics},
        "worker": {"metrics": metrics},
        "migrate": {},
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container("api")[probe]["grpc"]["port"] == port
    assert container("worker")["livenessProbe"]["httpGet"]["port"] == "metrics"
    (served,) = manifest("Service", "exportd")["spec"]["ports"]
    assert (served["port"], served["targetPort"]) == (port, "grpc")
    (scraped,) = manifest("NetworkPolicy", "exportd")["spec"]["ingress"]
    assert [each["port"] for each in scraped["ports"]] == [metrics]
    (called,) = manifest("NetworkPolicy", "exportd-api")["spec"]["ingress"]
    assert [each["port"] for each in called["ports"]] == [port]


# --- the end


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)s?", text)
    assert match is not None, text
    return float(match[1])


def test_everybody_waits_until_the_drain_is_over(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("api", "worker"):
        settings = in_compose(monkeypatch, secrets, name)
        grace = seconds(services()[name]["stop_grace_period"])
        assert grace >= settings.drain_timeout + AFTER_THE_DRAIN, name
    for component in ("api", "worker"):
        settings = in_kubernetes(monkeypatch, component)
        pause = container(component).get("lifecycle", {}).get("preStop")
        before = pause["sleep"]["seconds"] if pause else 0
        grace = pods()[component]["terminationGracePeriodSeconds"]
        assert grace >= before + settings.drain_timeout + AFTER_THE_DRAIN, component
    default = Settings.model_fields["drain_timeout"].default
    for path in UNITS:
        (text,) = unit(path).get("TimeoutStopSec", ["none"])
        if path.name != "exportd-migrate.service":
            assert seconds(text) >= default + AFTER_THE_DRAIN, path.name


# --- systemd


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="needs systemd-analyze, of the package systemd",
)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as of an installation in the place where this Python is."""
    here = str(Path(sys.executable).parent)
    for path in UNITS:
        text = path.read_text()
        assert "/opt/exportd/bin/exportd-server" in text
        (tmp_path / path.name).write_text(text.replace("/opt/exportd/bin", here))
    return tmp_path


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )


@needs_systemd
def test_systemd_takes_the_units(installed: Path) -> None:
    units = [installed / path.name.replace("@.", "@1.") for path in UNITS]
    done = systemd_analyze("verify", *units)
    assert done.returncode == 0, done.stderr
    # What it does not know it passes by, with a line.
    assert done.stdout + done.stderr == ""


@needs_systemd
def test_a_mistake_in_a_unit_is_found(installed: Path) -> None:
    path = installed / "exportd-api.service"
    path.write_text(path.read_text().replace("TimeoutStopSec=45", "TimeoutStopSecs=45"))
    assert "TimeoutStopSecs" in systemd_analyze("verify", path).stderr


@needs_systemd
@pytest.mark.parametrize("name", [path.name for path in UNITS])
def test_units_are_exposed_to_little(installed: Path, name: str) -> None:
    # Of 100: 96 without any hardening, 13 as they are.
    done = systemd_analyze("security", "--offline=true", "--threshold=15", installed / name)
    assert done.returncode == 0, done.stdout


# --- Kubernetes


@pytest.mark.parametrize(
    ("path", "document"),
    list(manifests()),
    ids=lambda each: each.stem if isinstance(each, Path) else each["kind"],
)
def test_kubernetes_knows_every_field(path: Path, document: dict[str, Any]) -> None:
    for version in ("1.34", "1.37"):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    wrong = manifest("Deployment", "exportd-api")
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 50
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_the_kustomization_names_every_file() -> None:
    (kustomization,) = documents(KUBERNETES / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == sorted({p.name for p, _ in manifests()})
    generators = [
        *kustomization["configMapGenerator"],
        *kustomization["secretGenerator"],
    ]
    for generator in generators:
        for name in [*generator.get("files", []), *generator.get("envs", [])]:
            path = KUBERNETES / name
            assert path.exists() or path.with_name(f"{path.name}.example").exists(), name
    made = {generator["name"] for generator in generators}
    used = {
        reference["name"]
        for pod in pods().values()
        for source in pod["containers"][0]["envFrom"]
        for reference in source.values()
    } | {
        volume[kind][key]
        for pod in pods().values()
        for volume in pod["volumes"]
        for kind, key in (("secret", "secretName"), ("configMap", "name"))
        if kind in volume
    }
    assert used == made


def test_labels_find_the_pods() -> None:
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for _, each in manifests()
        if each["kind"] == "Deployment"
    }
    for name in ("exportd-api", "exportd-worker"):
        assert (
            manifest("Deployment", name)["spec"]["selector"]["matchLabels"] == labels[name]
        )
        budget = manifest("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"]
        assert budget == labels[name]
    assert manifest("Service", "exportd")["spec"]["selector"] == labels["exportd-api"]
    scaled = manifest("HorizontalPodAutoscaler", "exportd-worker")["spec"]["scaleTargetRef"]
    assert scaled["name"] in labels


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_builds_it(tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    for example in copy.glob("secret/*.example"):
        shutil.copy(example, example.with_suffix(""))
    done = subprocess.run(
        ["kubectl", "kustomize", str(copy)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) > len(list(manifests()))
    for document in built:
        kubernetes_validate.validate(document, "1.37", strict=True)


# --- the health check


@pytest.mark.parametrize("serves", [True, False])
def test_the_health_check_tells_whether_a_server_serves(serves: bool) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    states = health_pb2.HealthCheckResponse
    servicer.set("", states.SERVING if serves else states.NOT_SERVING)
    try:
        done = check_health(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
    assert done.returncode == (0 if serves else 1)
    assert done.stdout.split()[-1] == ("SERVING" if serves else "NOT_SERVING")


def test_the_health_check_tells_that_nobody_is_there() -> None:
    done = check_health("127.0.0.1:1")
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stdout


def check_health(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEPLOY / "healthcheck.py"), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
