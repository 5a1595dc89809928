# Times inference in R; its start-up and the fits are not counted, but for the bootstrap's own.
#
# Usage: Rscript bench_inference.R FOLDER REPETITIONS BOOTSTRAPS
#        (FOLDER has sleepstudy.csv, cake.csv, slopes.csv)
# Prints one line "name seconds" per measurement.
suppressPackageStartupMessages({
  library(lme4)
  library(lmerTest)
  library(pbkrtest)
})

arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]
repetitions <- as.integer(arguments[2])
bootstraps <- as.integer(arguments[3])
say <- function(name, seconds) cat(name, format(seconds, digits = 15), "\n")
read <- function(name) read.csv(file.path(folder, paste0(name, ".csv")), stringsAsFactors = TRUE)

# Median seconds of a call.
median_time <- function(name, call, times = repetitions) {
  say(name, median(replicate(times, {
    began <- proc.time()[["elapsed"]]
    call()
    proc.time()[["elapsed"]] - began
  })))
}

sleepstudy <- read("sleepstudy")
sleepstudy$Subject <- factor(sleepstudy$Subject)
cake <- read("cake")
cake$temperature <- factor(cake$temperature)
cake$replicate <- factor(cake$replicate)
slopes <- read("slopes")
slopes$g <- factor(slopes$g)

plain <- lme4::lmer(Reaction ~ Days + (Days | Subject), sleepstudy)
cakes <- lme4::lmer(angle ~ recipe * temperature + (1 | recipe:replicate), cake)
large <- lme4::lmer(y ~ x * f + (x | g), slopes)
median_time("satterthwaite", function() coef(summary(as_lmerModLmerTest(large))))
tested <- as_lmerModLmerTest(large)
median_time("kenward_roger", function() coef(summary(tested, ddf = "Kenward-Roger")), 3)
tested <- as_lmerModLmerTest(cakes)
median_time("anova", function() anova(tested, ddf = "Kenward-Roger"))
median_time("profile", function() {
  suppressMessages(confint(plain, method = "profile", quiet = TRUE))
}, 3)
began <- proc.time()[["elapsed"]]
invisible(suppressMessages(bootMer(plain, fixef, nsim = bootstraps)))
say("bootstrap", proc.time()[["elapsed"]] - began)
