# Best optimum of lme4's own deviance function for every model of a manifest.
#
# Usage: Rscript make_lme4.R MANIFEST OUTPUT
#
# MANIFEST is a JSON array of objects with name, file (a CSV), formula, reml, weights (a column
# name or null), full (unrestricted covariance), and start (a theta near the truth, in lme4's
# order). OUTPUT gets, per model: n; value, the lowest criterion found; theta; excess, by how
# much the criterion rises when the relative covariance matrix is held singular; singular_lme4,
# lme4's own test of theta's diagonal; runs and at_best, searches made and searches that came
# within 1e-6 of the lowest.
suppressPackageStartupMessages({
  library(lme4)
  library(jsonlite)
})

control <- lmerControl(
  check.nobs.vs.nlev = "ignore", check.nobs.vs.nRE = "ignore",
  check.nobs.vs.rankZ = "ignore", check.nlev.gtr.1 = "ignore",
  check.scaleX = "ignore", check.conv.grad = "ignore", check.conv.hess = "ignore",
  check.conv.singular = "ignore"
)

bobyqa_minqa <- function(f, start, lower) {
  # minqa needs two parameters; its first step has to fit between the bounds.
  if (length(start) < 2) return(NULL)
  fit <- minqa::bobyqa(start, f, lower = lower,
                       control = list(rhobeg = 0.2, rhoend = 1e-10, maxfun = 20000))
  list(value = fit$fval, theta = fit$par)
}
bobyqa_nlopt <- function(f, start, lower) {
  fit <- nloptr::nloptr(start, f, lb = lower, opts = list(
    algorithm = "NLOPT_LN_BOBYQA", xtol_rel = 1e-11, xtol_abs = rep(1e-11, length(start)),
    ftol_abs = 1e-13, maxeval = 20000
  ))
  list(value = fit$objective, theta = fit$solution)
}
port <- function(f, start, lower) {
  fit <- nlminb(start, f, lower = lower, control = list(
    rel.tol = 1e-15, x.tol = 1e-12, eval.max = 20000, iter.max = 2000
  ))
  list(value = fit$objective, theta = fit$par)
}

# Runs every optimiser from every start, then again from the best point until nothing is gained.
search <- function(f, starts, bounds, optimisers) {
  runs <- list()
  attempt <- function(optimiser, start, lower) {
    fit <- tryCatch(suppressWarnings(optimiser(f, pmax(start, lower), lower)),
                    error = function(e) NULL)
    if (!is.null(fit) && is.finite(fit$value)) runs[[length(runs) + 1]] <<- fit
  }
  best <- function() runs[[which.min(vapply(runs, `[[`, 0, "value"))]]
  for (start in starts) for (lower in bounds) for (o in optimisers) attempt(o, start, lower)
  value <- Inf
  while (value - best()$value > 1e-9 * max(1, abs(value) * 1e-4) || !is.finite(value)) {
    value <- best()$value
    for (lower in bounds) for (o in optimisers) attempt(o, best()$theta, lower)
  }
  values <- vapply(runs, `[[`, 0, "value")
  c(best(), runs = length(runs), at_best = sum(values < min(values) + 1e-6))
}

fit_one <- function(job) {
  data <- read.csv(job$file, stringsAsFactors = TRUE)
  arguments <- list(as.formula(job$formula), data, REML = job$reml, control = control,
                    devFunOnly = TRUE)
  if (!is.null(job$weights)) arguments$weights <- data[[job$weights]]
  f <- suppressMessages(do.call(lmer, arguments))
  lower <- environment(f)$lower
  k <- length(lower)
  large <- nrow(data) > 5000
  free <- rep(-Inf, k)
  optimisers <- list(bobyqa_minqa, bobyqa_nlopt, port)
  if (large) optimisers <- list(if (k > 1) bobyqa_minqa else bobyqa_nlopt, port)
  start <- unlist(job$start)
  scattered <- function(count) lapply(seq_len(count), function(i) rnorm(k) * exp(rnorm(k)))
  starts <- c(list(as.numeric(lower == 0), start), if (k > 1) scattered(if (large) 0 else 4))
  bounds <- if (k > 1 && !large) list(lower, free) else list(lower)
  best <- search(f, starts, bounds, optimisers)

  # The criterion with the matrix held singular: the last entry of an unrestricted factor, or
  # any one of the standard deviations of a diagonal one, is zero.
  held <- if (job$full) k else seq_len(k)
  value <- Inf
  for (h in held) {
    if (k == 1) {
      value <- f(0)
      break
    }
    restricted <- function(theta) f(append(theta, 0, after = h - 1))
    from <- c(list(best$theta, start), if (!large) scattered(3))
    from <- lapply(from, function(theta) theta[-h])
    one <- search(restricted, from, list(free[-h]), optimisers)
    value <- min(value, one$value)
  }
  if (value < best$value) best$value <- value
  list(
    name = job$name, n = nrow(data), value = best$value, theta = best$theta,
    excess = value - best$value, singular_lme4 = any(abs(best$theta[lower == 0]) < 1e-4),
    runs = best$runs, at_best = best$at_best
  )
}

arguments <- commandArgs(trailingOnly = TRUE)
jobs <- fromJSON(arguments[1], simplifyVector = FALSE)
results <- list()
for (job in jobs) {
  set.seed(1)
  began <- proc.time()[["elapsed"]]
  results[[length(results) + 1]] <- fit_one(job)
  message(sprintf("%s %.1f s", job$name, proc.time()[["elapsed"]] - began))
}
write_json(results, arguments[2], digits = NA, auto_unbox = TRUE)
