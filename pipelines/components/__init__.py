"""The steps of the cycle as components, a file each.

kfp sends the text of each function alone, so that everything it uses it imports itself; what it does is in
pipelines/steps.py, which is in the image. No parameter and no artifact names an image or a person: requests go by
number and commitment. Artifacts hold figures and pages; what is large stays where the cycle keeps it, and `uri` in
their metadata says where that is: Kubeflow's launcher copies a step's output into its own bucket, and refuses a URI in
another.
"""
