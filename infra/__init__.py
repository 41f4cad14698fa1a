"""Images, manifests, set-up scripts. Nothing imports it; jobs/rayjob.py reads kubernetes/rendered."""
