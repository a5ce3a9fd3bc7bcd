"""What is looked at before anything is computed: does params.yaml fit together, do classes meet, have sources changed?"""
