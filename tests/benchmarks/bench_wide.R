# Times glmmTMB ("times") or lme4 ("columns") on a table; R's own start-up is never counted.
#
# Usage: Rscript bench_wide.R times|columns FILE FORMULA
# Prints one line "name value" per measurement, as bench_lme4.R does; the second fit is the one timed.
arguments <- commandArgs(trailingOnly = TRUE)
data <- read.csv(arguments[2])
formula <- as.formula(arguments[3])
for (name in intersect(c("g", "t", "firm", "year"), names(data))) data[[name]] <- factor(data[[name]])
fit <- if (arguments[1] == "times") {
  function() glmmTMB::glmmTMB(formula, data, REML = TRUE)
} else {
  function() lme4::lmer(formula, data)
}
if (arguments[1] == "times") invisible(fit())
began <- proc.time()[["elapsed"]]
found <- suppressWarnings(fit())
cat("second", format(proc.time()[["elapsed"]] - began, digits = 15), "\n")
cat("criterion", format(-2 * as.numeric(logLik(found)), digits = 15), "\n")
