"""How much quality a policy costs: continued texts, needles, questions, summaries."""
