"""The rendered manifests' own commands, as processes on hosts named like the Services.

``ray start``, the entrypoints, MLflow's arguments and every variable are read from the overlay
``kind`` (``tests.infra.manifest``). Instead of pods there are hosts, instead of the S3 image moto,
instead of PostgreSQL's image the installed server; NetworkPolicies are not enforced.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hosts.lab import BIN, answers
from tests.hosts.net import Host, Network, wait
from tests.infra import manifest

HERE = "overlays/kind"
TOKEN = "token-of-the-manifest-test-0123456789"
SECRETS = {
    "avzero-s3": {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
    "avzero-mlflow": {
        "username": "avzero",
        "password": "password-of-the-test",
        "flask-secret": "secret-of-the-test",
    },
    "avzero-postgres": {"password": "password-of-the-database"},
}
IMAGE = {"PATH": f"{BIN}:/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT / "platform")}
"""What the image would hold."""
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))

Documents = list[dict[str, Any]]


def write_files(host: Host, files: Mapping[str, str]) -> None:
    """Put what a pod would find mounted where it would find it."""
    for path, text in files.items():
        source = host.root / "mounted" / path.lstrip("/")
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(text)
        done = host.run(["sh", "-c", f"mkdir -p {Path(path).parent} && cp {source} {path}"])
        assert done.returncode == 0, done.stderr


def start_postgres(host: Host, documents: Documents) -> None:
    """Start the database as its image would, from the StatefulSet's variables."""
    pod = manifest.find(documents, "StatefulSet", "postgres")["spec"]["template"]["spec"]
    env = manifest.environment(documents, manifest.container(pod), SECRETS)
    home = host.root / "postgres"
    home.mkdir()
    shutil.chown(home, "postgres", "postgres")
    (host.root / "password").write_text(env["POSTGRES_PASSWORD"])
    (host.root / "password").chmod(0o644)
    for folder in (host.root, host.root.parent):
        folder.chmod(0o755)
    tools, data = POSTGRES[-1].parent, home / "data"
    user, network = env["POSTGRES_USER"], "10.77.0.0/24"
    script = " && ".join(
        [
            f"{tools}/initdb -D {data} -U {user} -A scram-sha-256 --pwfile={host.root}/password "
            "--no-sync --locale=C.UTF-8",
            f"echo 'host all all {network} scram-sha-256' >> {data}/pg_hba.conf",
            f"{tools}/pg_ctl -D {data} -w -l {home}/log "
            f"-o \"-c listen_addresses='*' -c unix_socket_directories={home}\" start",
            f"PGPASSWORD={env['POSTGRES_PASSWORD']} "
            f"{tools}/createdb -h {home} -U {user} {env['POSTGRES_DB']}",
        ]
    )
    done = host.run(["runuser", "-u", "postgres", "--", "sh", "-c", script], timeout=90)
    assert done.returncode == 0 or "already exists" in done.stderr, done.stdout + done.stderr


def start_mlflow(host: Host, documents: Documents) -> None:
    """Upgrade the database, then start the server, both with the Deployment's own commands."""
    pod = manifest.mlflow_pod(documents)
    for name in ("db-upgrade", "mlflow"):
        of = manifest.container(pod, name)
        env = IMAGE | manifest.environment(documents, of, SECRETS)
        write_files(host, manifest.mounted_files(documents, pod, of))
        if name == "db-upgrade":
            done = host.run(manifest.command(of), env, timeout=180)
            assert done.returncode == 0, done.stderr
        else:
            host.start(manifest.command(of), "mlflow.log", env)


def ray_env(documents: Documents, pod: dict[str, Any], on_head: bool) -> dict[str, str]:
    """Return what a Ray container starts with."""
    own = manifest.environment(documents, manifest.container(pod), SECRETS)
    return IMAGE | own | manifest.ray_environment("sweep", "sweep-head", TOKEN, on_head=on_head)


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL (apt-get install postgresql)")
def test_the_manifests_commands_complete_a_sweep(ground: Path) -> None:
    documents = manifest.render(HERE)
    jobs = manifest.render(f"{HERE}-jobs")
    sweep = manifest.find(jobs, "RayJob", "sweep")
    spec = manifest.ray_spec(sweep)
    head_pod = manifest.group(spec)["template"]["spec"]
    worker = spec["workerGroupSpecs"][0]["groupName"]
    names = ["sweep-head", "worker1", "worker2", "store", "mlflow", "postgres"]
    net = Network(ground, names)
    try:
        head, store = net["sweep-head"], net["store"]
        store.start([BIN / "moto_server", "-H", store.address, "-p", 9000], "moto.log", IMAGE)
        s3 = f"http://{store.address}:9000"
        wait(lambda: answers(s3), 60, "moto")
        start_postgres(net["postgres"], documents)
        env = ray_env(documents, head_pod, on_head=True)
        write_files(head, manifest.mounted_files(documents, head_pod, manifest.container(head_pod)))
        head.start(manifest.ray_start(spec), "ray.log", env)
        start_mlflow(net["mlflow"], documents)
        pod = manifest.group(spec, worker)["template"]["spec"]
        for name in ("worker1", "worker2"):
            command = manifest.ray_start(spec, worker, "sweep-head")
            net[name].start(command, "ray.log", ray_env(documents, pod, on_head=False))

        make = "import boto3; boto3.client('s3').create_bucket(Bucket='avzero')"
        assert head.run([BIN / "python", "-c", make], env).returncode == 0
        dashboard = f"http://{head.address}:8265"
        wait(lambda: answers(f"{dashboard}/api/gcs_healthz"), 120, "the dashboard")
        mlflow = f"http://{net['mlflow'].address}:5000/health"
        wait(lambda: answers(mlflow), 120, "MLflow")
        for name in ("ingest", "sweep"):
            job = manifest.find(jobs, "RayJob", name)
            submit = manifest.submit_command(job, "http://sweep-head:8265")
            done = head.run(["bash", "-c", submit], env, timeout=400)
            said = done.stdout + done.stderr
            status = f"ray job status --address http://sweep-head:8265 {job['spec']['jobId']}"
            state = head.run(shlex.split(status), env).stdout + said
            assert "SUCCEEDED" in state or "succeeded" in state, state[-3000:]
        check(head, env)
    finally:
        net.close()


def check(head: Host, env: Mapping[str, str]) -> None:
    """Look for the sweep's trials in the store and in MLflow, from a host that may."""
    look = (
        "import os, mlflow; from avzero.data.storage import open_storage\n"
        "keys = open_storage(os.environ['AVZERO_STORE']).keys('sweeps/demo/trials/')\n"
        "client = mlflow.MlflowClient(os.environ['AVZERO_TRACKING'])\n"
        "ids = [e.experiment_id for e in client.search_experiments()]\n"
        "runs = client.search_runs(ids, \"tags.`avzero.sweep` = 'demo'\")\n"
        "nested = [r for r in runs if 'mlflow.parentRunId' in r.data.tags]\n"
        "print(len(keys), len(nested), len({r.data.tags['avzero.run'] for r in nested}))\n"
        "print({r.info.artifact_uri.split(':')[0] for r in nested})\n"
    )
    done = head.run([BIN / "python", "-c", look], env, timeout=120)
    assert done.stdout.splitlines()[:1] == ["8 8 8"], done.stdout + done.stderr
