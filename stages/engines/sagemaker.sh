#!/bin/bash
# What the container of each instance runs: sagemaker.sh <project> <state folder below it> <python> <options of node.py>
# The project's folder came as a channel, which ranks may not write. Its state folder, with checkpoints and outs, becomes
# the one that SageMaker copies to S3 while they train, and back when the same job name starts again.
set -eu
ml=${ML:-/opt/ml}
project=$1 state=$1/$2 python=$3
shift 3
mkdir -p "$project" "$ml/checkpoints"
cp -r "$ml/input/data/project/." "$project"
if [ -d "$state" ]; then
    cp -rn "$state/." "$ml/checkpoints/"
    rm -rf "$state"
fi
mkdir -p "$(dirname "$state")"
ln -s "$ml/checkpoints" "$state"
cd "$project"
hosts=$("$python" - "$ml/input/config/resourceconfig.json" <<'END'
import json, sys
own = json.load(open(sys.argv[1]))
hosts = sorted(own["hosts"])
print(hosts.index(own["current_host"]), hosts[0])
END
)
exec "$python" -m stages.training.node "$state/job.json" "$@" --node-rank "${hosts% *}" --master-address "${hosts#* }"
