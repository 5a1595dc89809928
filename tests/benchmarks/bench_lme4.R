# Times lme4; R's own start-up is never counted.
#
# Usage: Rscript bench_lme4.R warm FOLDER REPETITIONS     (FOLDER has sleepstudy.csv, dietox.csv)
#        Rscript bench_lme4.R factors FOLDER REPETITIONS  (penicillin.csv, pastes.csv)
#        Rscript bench_lme4.R large FOLDER FORMULA [REML|ML FACTOR ...]
#                         (columns.txt and one file of doubles per column; FACTOR is g by default)
#        Rscript bench_lme4.R many FOLDER FORMULA         (data.csv; its columns y0, y1, ... are
#                         responses, whose estimates, by a tight search, go to estimates.csv)
# Prints one line "name seconds" per measurement.
suppressPackageStartupMessages(library(lme4))

arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[2]
say <- function(name, seconds) cat(name, format(seconds, digits = 15), "\n")

# Median seconds of a call, after one that is not timed.
median_time <- function(name, call) {
  call()
  seconds <- replicate(as.integer(arguments[3]), {
    began <- proc.time()[["elapsed"]]
    # A clock tick is a millisecond: time several calls together.
    for (i in 1:5) call()
    (proc.time()[["elapsed"]] - began) / 5
  })
  say(name, median(seconds))
}

if (arguments[1] == "warm") {
  sleepstudy <- read.csv(file.path(folder, "sleepstudy.csv"), stringsAsFactors = TRUE)
  sleepstudy$Subject <- factor(sleepstudy$Subject)
  dietox <- read.csv(file.path(folder, "dietox.csv"), stringsAsFactors = TRUE)
  dietox$Pig <- factor(dietox$Pig)
  slope <- Reaction ~ Days + (Days | Subject)
  parsed <- lFormula(slope, sleepstudy)
  fitted <- lmer(slope, sleepstudy)
  response <- rev(sleepstudy$Reaction)
  median_time("sleepstudy_solve", function() {
    optimizeLmer(do.call(mkLmerDevfun, parsed))
  })
  median_time("sleepstudy_slope", function() lmer(slope, sleepstudy))
  median_time("sleepstudy_refit", function() refit(fitted, response))
  median_time("dietox_int", function() lmer(Weight ~ Time + (1 | Pig), dietox))
  median_time("dietox_slope", function() suppressWarnings(lmer(Weight ~ Time + (Time | Pig), dietox)))
} else if (arguments[1] == "factors") {
  models <- list(
    penicillin = diameter ~ 1 + (1 | plate) + (1 | sample),
    pastes = strength ~ 1 + (1 | batch) + (1 | batch:cask)
  )
  for (name in names(models)) {
    data <- read.csv(file.path(folder, paste0(name, ".csv")), stringsAsFactors = TRUE)
    parsed <- lFormula(models[[name]], data)
    median_time(paste0(name, "_solve"), function() optimizeLmer(do.call(mkLmerDevfun, parsed)))
    median_time(paste0(name, "_fit"), function() lmer(models[[name]], data))
    say(paste0(name, "_criterion"), -2 * as.numeric(logLik(lmer(models[[name]], data))))
  }
} else if (arguments[1] == "many") {
  data <- read.csv(file.path(folder, "data.csv"))
  data$g <- factor(data$g)
  responses <- grep("^y[0-9]+$", names(data), value = TRUE)
  formula <- as.formula(paste("y", arguments[3]))
  # Either may stop at a boundary too early; the better one counts.
  tight <- list(
    lmerControl("bobyqa", calc.derivs = FALSE, optCtrl = list(rhoend = 1e-9, maxfun = 1e5)),
    lmerControl("Nelder_Mead", calc.derivs = FALSE, optCtrl = list(
      FtolAbs = 1e-12, FtolRel = 1e-15, XtolRel = 1e-10, maxfun = 1e5
    ))
  )
  data$y <- data[[responses[1]]]
  each <- function(name, control) {
    data$y <- data[[name]]
    suppressMessages(suppressWarnings(lmer(formula, data, control = control)))
  }
  first <- each(responses[1], lmerControl())
  began <- proc.time()[["elapsed"]]
  for (name in responses) each(name, lmerControl())
  say("lmer", proc.time()[["elapsed"]] - began)
  began <- proc.time()[["elapsed"]]
  for (name in responses) suppressMessages(suppressWarnings(refit(first, data[[name]])))
  say("refit", proc.time()[["elapsed"]] - began)
  estimates <- t(sapply(responses, function(name) {
    fits <- lapply(tight, each, name = name)
    fit <- fits[[which.min(sapply(fits, function(fit) -2 * as.numeric(logLik(fit))))]]
    bse <- sqrt(diag(as.matrix(vcov(fit))))
    c(-2 * as.numeric(logLik(fit)), unname(fixef(fit)), unname(bse))
  }))
  p <- (ncol(estimates) - 1) / 2
  colnames(estimates) <- c("criterion", paste0("params", 1:p - 1), paste0("bse", 1:p - 1))
  write.csv(format(estimates, digits = 17), file.path(folder, "estimates.csv"), row.names = FALSE)
} else {
  reml <- is.na(arguments[4]) || arguments[4] == "REML"
  factors <- if (length(arguments) > 4) arguments[-(1:4)] else "g"
  columns <- readLines(file.path(folder, "columns.txt"))
  data <- lapply(columns, function(name) {
    path <- file.path(folder, paste0(name, ".f64"))
    readBin(path, "double", n = file.size(path) / 8)
  })
  data <- as.data.frame(setNames(data, columns))
  formula <- as.formula(arguments[3])
  began <- proc.time()[["elapsed"]]
  data[factors] <- lapply(data[factors], factor)
  fit <- suppressWarnings(lmer(formula, data, REML = reml))
  say("first", proc.time()[["elapsed"]] - began)
  say("criterion", -2 * as.numeric(logLik(fit)))
}
