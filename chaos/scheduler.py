"""A stand-in for SLURM on this machine: sbatch, srun and scontrol, which run the real script of a job.

Its nodes are two tasks side by side, as srun starts them. The real SLURM: tests/slurm_cluster.py.
"""

import os
import sys
from pathlib import Path

FULL, OVER = "full", "over"  # files beside the commands: the user's queue is full; the job's time is over
COMMANDS = {
    "sbatch": """#!{python}
import os, re, subprocess, sys
if os.path.exists("{folder}/full"):  # in SLURM's own words
    print("sbatch: error: QOSMaxSubmitJobPerUserLimit", file=sys.stderr)
    policy = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    sys.exit("sbatch: error: Batch job submission failed: " + policy)
script = open(sys.argv[-1]).read()
asked = dict(re.findall(r"^#SBATCH --([\\w-]+)=(.*)$", script, re.M))
print(7, flush=True)
log = open(asked["output"], "a")
env = os.environ | {{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here[0-1]", "SLURM_NNODES": asked["nodes"]}}
sys.exit(subprocess.run(["bash", sys.argv[-1]], cwd=asked["chdir"], env=env, stdout=log, stderr=log).returncode)
""",
    "srun": """#!{python}
import os, subprocess, sys, time
cores, tasks, told = sorted(os.sched_getaffinity(0)), [], False
for node in range(int(os.environ["SLURM_NNODES"])):
    own = [cores[(node * {cores} + k) % len(cores)] for k in range({cores})]
    alone = ["taskset", "-c", ",".join(map(str, own))]
    tasks.append(subprocess.Popen([*alone, *sys.argv[2:]], env=os.environ | {{"SLURM_NODEID": str(node)}}))
assert sys.argv[1] == "--kill-on-bad-exit=1"
while any(task.poll() is None for task in tasks):
    if os.path.exists("{folder}/over") and not told:
        told = True
        for task in tasks:
            task.terminate()
    if any(task.poll() for task in tasks):
        for task in tasks:
            task.kill()
    time.sleep(0.1)
sys.exit(1 if any(task.returncode for task in tasks) else 0)
""",
    "scontrol": """#!{python}
import os, sys
state = "TIMEOUT" if os.path.exists("{folder}/over") else "FAILED"
sys.stdout.write("127.0.0.1\\n127.0.0.1\\n" if "hostnames" in sys.argv else f"JobState={{state}}\\n")
""",
}


def stand_in(folder: Path, cores_per_node: int = 1) -> str:
    """Writes the commands into this folder; the PATH that finds them, and this Python, first."""
    folder.mkdir(exist_ok=True)
    for name, text in COMMANDS.items():
        (folder / name).write_text(text.format(python=sys.executable, folder=folder, cores=cores_per_node))
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
