"""The serverless functions: plain AWS Lambda handlers, which `python -m lambdas.local` answers for on any machine."""
