//! Logging: JSON lines on standard error through `tracing`, a filter that can be changed while running,
//! and the logging flags of the original, which are accepted and ignored.

use std::str::FromStr;

use clap::ValueEnum;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// Default filter. What kube's client says of failed requests, we say with their subject.
const DEFAULT_FILTER: &str = "info,kube_client::client::builder=off";

/// Flags about logging.
#[derive(clap::Args, Clone, Debug)]
pub struct LogArgs {
    /// Form of log lines on standard error.
    #[arg(long, env = "COIL_LOG_FORMAT", value_enum, default_value_t = LogFormat::Json, help_heading = "Logging")]
    pub log_format: LogFormat,
    /// What to log: a level, or directives such as `info,coil_agent=debug`.
    #[arg(long, env = "RUST_LOG", default_value = DEFAULT_FILTER, help_heading = "Logging")]
    pub log_level: String,
    /// Flags of the original.
    #[command(flatten)]
    pub legacy: LegacyLogArgs,
}

impl Default for LogArgs {
    fn default() -> Self {
        Self {
            log_format: LogFormat::Json,
            log_level: DEFAULT_FILTER.to_owned(),
            legacy: LegacyLogArgs::default(),
        }
    }
}

/// Form of log lines.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object per line.
    Json,
}

macro_rules! legacy_flags {
    ($($(#[$attribute:meta])* $field:ident: $long:literal;)*) => {
        /// Flags of klog and zap that manifests of the original pass. They have no effect.
        #[derive(clap::Args, Clone, Debug, Default)]
        #[expect(missing_docs, reason = "named after the flags")]
        pub struct LegacyLogArgs {
            #[arg(short = 'v', hide = true, value_name = "N", overrides_with = "verbosity")]
            pub verbosity: Option<String>,
            $(
                #[arg(long = $long, alias = concat!($long, "-legacy"), hide = true, overrides_with = stringify!($field))]
                $(#[$attribute])*
                pub $field: Option<String>,
            )*
        }
    };
}

legacy_flags! {
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    zap_devel: "zap-devel";
    zap_encoder: "zap-encoder";
    zap_log_level: "zap-log-level";
    zap_stacktrace_level: "zap-stacktrace-level";
    zap_time_encoding: "zap-time-encoding";
    vmodule: "vmodule";
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    logtostderr: "logtostderr";
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    alsologtostderr: "alsologtostderr";
    log_file: "log_file";
    log_dir: "log_dir";
    log_file_max_size: "log_file_max_size";
    stderrthreshold: "stderrthreshold";
    log_backtrace_at: "log_backtrace_at";
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    add_dir_header: "add_dir_header";
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    skip_headers: "skip_headers";
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    skip_log_headers: "skip_log_headers";
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    one_output: "one_output";
}

/// Why logging cannot be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter cannot be read.
    #[error("bad log filter {filter:?}")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Logging was set up before.
    #[error("cannot install the logger")]
    Install(#[from] tracing_subscriber::util::TryInitError),
    /// The subscriber is gone.
    #[error("cannot change the log filter")]
    Reload(#[from] reload::Error),
}

/// Reads and changes the log filter of the running process.
#[derive(Clone, Debug)]
pub struct LogHandle(Option<reload::Handle<EnvFilter, Registry>>);

impl LogHandle {
    /// A handle that changes nothing, for tests.
    #[must_use]
    pub fn detached() -> Self {
        Self(None)
    }

    /// The filter in force.
    #[must_use]
    pub fn filter(&self) -> String {
        self.0.as_ref().and_then(|h| h.with_current(ToString::to_string).ok()).unwrap_or_default()
    }

    /// Puts another filter in force.
    ///
    /// # Errors
    /// The filter cannot be read.
    pub fn set_filter(&self, filter: &str) -> Result<(), TelemetryError> {
        let parsed = parse_filter(filter)?;
        match &self.0 {
            Some(handle) => Ok(handle.reload(parsed)?),
            None => Ok(()),
        }
    }
}

/// Starts logging and says hello.
///
/// # Errors
/// The filter cannot be read, or logging was started before.
pub fn init(program: &'static str, args: &LogArgs) -> Result<LogHandle, TelemetryError> {
    let (filter, handle) = reload::Layer::new(parse_filter(&args.log_level)?);
    let output = fmt::layer().with_writer(std::io::stderr);
    let output = match args.log_format {
        LogFormat::Text => output.with_ansi(false).boxed(),
        LogFormat::Json => output.json().flatten_event(true).with_span_list(false).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(output).try_init()?;
    tracing::info!(program, version = crate::cli::version(), filter = args.log_level, "started");
    Ok(LogHandle(Some(handle)))
}

fn parse_filter(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::from_str(filter).map_err(|source| TelemetryError::Filter { filter: filter.to_owned(), source })
}
