"""Making predictors: closed-form ridge maps."""
