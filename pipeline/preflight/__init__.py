"""Before work is spent: is the Hessian well defined, which engine gets it right, and what is it going to cost?

In come a problem and settings; out goes a frozen `JobPlan`, or a refusal that says what to write instead.
"""
