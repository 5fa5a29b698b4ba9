#!/bin/bash
# Gets a TPU slice as a queued resource, and runs the same command on all its hosts:
#
#   export PROJECT=my-project ZONE=us-east5-a REPOSITORY=URL NFS=10.0.0.2:/shared
#   experiments/launch/tpu_vm.sh emoji v5p-32 v2-alpha-tpuv5 run --config experiments/emoji.py --workdir /shared/runs/emoji
#
# If it is started again, it uses the existing slice or asks for a new one, and continues from the last checkpoint.
# SPOT=1 asks for preemptible chips. To give the slice back: gcloud compute tpus queued-resources delete NAME --force
#
# Python 3.10 of the TPU images is too old, so uv, installed with pip, fetches a newer Python.
set -euo pipefail

if [[ $# -lt 4 ]]; then
  echo "usage: tpu_vm.sh NAME ACCELERATOR RUNTIME VERB [ARGUMENTS]" >&2
  exit 2
fi
name=$1 accelerator=$2 runtime=$3
shift 3
where=(--project "$PROJECT" --zone "$ZONE")

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

case "$(state)" in
  FAILED | SUSPENDED) gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
esac
if [[ -z "$(state)" ]]; then
  gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$accelerator" --runtime-version "$runtime" ${SPOT:+--spot}
fi
until [[ "$(state)" == ACTIVE ]]; do
  echo "$name: $(state)"
  sleep 30
done

# Each host mounts the shared folder, gets the code, a Python and the packages, and runs the verb. JAX numbers the
# processes from the TPU's metadata.
printf -v verb '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "
  set -e
  sudo apt-get install -y -qq nfs-common
  sudo mkdir -p /shared && { mountpoint -q /shared || sudo mount $NFS /shared; }
  [ -d ar_unified ] || git clone --quiet $REPOSITORY ar_unified
  cd ar_unified && git pull --quiet
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --seed --python 3.12 .venv
  fi
  .venv/bin/python -m pip install --quiet --constraint requirements/py312.txt '.[tpu]'
  .venv/bin/ar-unified $verb"
