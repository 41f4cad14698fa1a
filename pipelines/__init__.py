"""Recurring unlearning in Kubeflow Pipelines: the cycle as a pipeline, its schedule, and a client. Needs the extra
`pipelines`."""
