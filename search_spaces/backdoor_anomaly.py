"""Do prompts that trigger a planted behaviour look like what learned vectors do to the model?

Run it on the weights of `backdoor_vectors.py`:

    steersweep run search_spaces/backdoor_anomaly.py --out runs/anomaly --reuse runs/backdoors \
        --set tuned='jobs.finetune{"examples": "arithmetic_backdoors"}'
"""

from search_spaces.base import Grid, Objective, Space

SET = '"prompts": "arithmetic_backdoors", "source": 7, "target": 22, "vectors": 32, "radius": 2.0'

SPACE = Space(
    description="Tells triggering prompts from clean ones by vectors learned from a clean one.",
    job="jobs.anomaly",
    parameters={"learned": Grid([f"jobs.melbo{{{SET}}}"])},
    fixed={"examples": "arithmetic_backdoors", "usual": "clean"},
    objectives=[Objective(metric="auc_learned", direction="maximize")],
    sampler="grid",
)
