"""What a model is worth: language-model metrics and the n-grams it has to beat."""
