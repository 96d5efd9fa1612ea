//! What the CNI plugin is told when a call fails: a gRPC status with the CNI code as its detail.

use std::error::Error;

use prost::Message;
use tonic::{Code, Status};

use super::proto::{CniError, ErrorCode};

/// Type of the detail, as the original sends it.
pub const DETAIL_TYPE: &str = "type.googleapis.com/pkg.cnirpc.CNIError";

/// `google.rpc.Status`, the form in which details travel.
#[derive(Clone, PartialEq, Message)]
pub struct RpcStatus {
    /// gRPC code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// Message.
    #[prost(string, tag = "2")]
    pub message: String,
    /// Details.
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<prost_types::Any>,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Code of the CNI specification.
    pub code: ErrorCode,
    /// What failed.
    pub message: &'static str,
    /// Why.
    pub details: String,
}

impl Failure {
    /// A failure.
    pub fn new(code: ErrorCode, message: &'static str, details: impl Into<String>) -> Self {
        Self { code, message, details: details.into() }
    }

    /// A failure that another attempt may cure.
    pub fn retry(message: &'static str, details: impl Into<String>) -> Self {
        Self::new(ErrorCode::TryAgainLater, message, details)
    }

    /// A failure with the causes of an error as details.
    pub fn caused(code: ErrorCode, message: &'static str, error: &(dyn Error + 'static)) -> Self {
        Self::new(code, message, causes(error))
    }

    fn grpc_code(&self) -> Code {
        match self.code {
            ErrorCode::Unknown => Code::Unknown,
            ErrorCode::IncompatibleCniVersion
            | ErrorCode::UnsupportedField
            | ErrorCode::InvalidEnvironmentVariables
            | ErrorCode::DecodingFailure => Code::InvalidArgument,
            ErrorCode::UnknownContainer => Code::NotFound,
            ErrorCode::InvalidNetworkConfig | ErrorCode::InvalidNetns => Code::FailedPrecondition,
            ErrorCode::TryAgainLater | ErrorCode::PluginNotAvailable | ErrorCode::LimitedConnectivity => {
                Code::Unavailable
            }
            ErrorCode::IoFailure | ErrorCode::Internal => Code::Internal,
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let code = failure.grpc_code();
        let detail = CniError {
            code: failure.code.into(),
            msg: failure.message.into(),
            details: failure.details.clone(),
        };
        let message = format!("{}: {}", failure.message, failure.details);
        let status = RpcStatus {
            code: code.into(),
            message: message.clone(),
            details: vec![prost_types::Any { type_url: DETAIL_TYPE.into(), value: detail.encode_to_vec() }],
        };
        Self::with_details(code, message, status.encode_to_vec().into())
    }
}

/// The CNI error in a status, if it carries exactly one.
#[must_use]
pub fn detail(status: &Status) -> Option<CniError> {
    let status = RpcStatus::decode(status.details()).ok()?;
    let [detail] = status.details.as_slice() else {
        return None;
    };
    (detail.type_url.rsplit('/').next() == DETAIL_TYPE.rsplit('/').next())
        .then(|| CniError::decode(detail.value.as_slice()).ok())
        .flatten()
}

/// An error with its causes.
#[must_use]
pub fn causes(error: &(dyn Error + 'static)) -> String {
    // This one prints itself twice, once for programmers.
    if let Some(kube::Error::Api(status)) = error.downcast_ref() {
        return format!("the API server answered: {}", status.message);
    }
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors print their source themselves.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a97_a_failure_travels_as_the_detail_of_a_status() {
        let status = Status::from(Failure::retry("no", "because"));
        assert_eq!(status.code(), Code::Unavailable);
        let detail = detail(&status).unwrap();
        assert_eq!(detail.code, 11);
        assert_eq!((&*detail.msg, &*detail.details), ("no", "because"));
        assert!(super::detail(&Status::unknown("x")).is_none());
    }
}
