# Times lme4; R's own start-up is never counted.
#
# Usage: Rscript bench_lme4.R warm FOLDER REPETITIONS     (FOLDER has sleepstudy.csv, dietox.csv)
#        Rscript bench_lme4.R factors FOLDER REPETITIONS  (penicillin.csv, pastes.csv)
#        Rscript bench_lme4.R large FOLDER FORMULA [REML|ML FACTOR ...]
#                         (columns.txt and one file of doubles per column; FACTOR is g by default)
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
