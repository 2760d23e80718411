# Every table and figure of nbs/paper: `snakemake`, or `snakemake -c2 --config preset=smoke items="figure*"` (explained in nbs/reproduce/50_workflow.ipynb)
from sparsemax_sae.reproduce.paths import root
from sparsemax_sae.reproduce.workflow import asked, items, report

workdir: root()

PRESET, WHICH = asked(config)
ITEMS = items(PRESET, WHICH)

rule all:
    input: [item.stamp for item in ITEMS]

for item in ITEMS:
    rule:
        name: item.name
        message: item.message
        output: item.stamp
        log: item.executed, item.printed
        params: command=lambda wildcards, item=item: item.command   # a default, because `item` is the last one by the time a job runs
        threads: 1
        priority: item.runs   # the longest first
        resources: gpu=item.gpus
        shell: "export OMP_NUM_THREADS={threads}\n{params.command}"

onsuccess: print(report(ITEMS))
onerror: print(report(ITEMS))
