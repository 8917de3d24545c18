"""What a policy costs in quality: texts continued, needles found, questions answered, articles summarized."""
