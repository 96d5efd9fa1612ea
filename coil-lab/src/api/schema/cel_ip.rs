//! The IP and CIDR functions that Kubernetes adds to CEL, and its regex and list functions.

use std::net::IpAddr;
use std::sync::Arc;

use ::cel::extractors::This;
use ::cel::objects::{Opaque, Value};
use ::cel::{Context, DeclarationError, ExecutionError};
use ipnet::IpNet;

type CelResult = Result<Value, ExecutionError>;

/// An address as a CEL value.
#[derive(Debug, PartialEq, Eq)]
struct Ip(IpAddr);

impl Opaque for Ip {
    fn runtime_type_name(&self) -> &str {
        "net.IP"
    }
}

/// A prefix as a CEL value. Host bits are kept.
#[derive(Debug, PartialEq, Eq)]
struct Cidr(IpNet);

impl Opaque for Cidr {
    fn runtime_type_name(&self) -> &str {
        "net.CIDR"
    }
}

/// As strict as Kubernetes: no zones, no IPv4 within IPv6, no leading zeros.
fn parse_ip(text: &str) -> Option<IpAddr> {
    let ip: IpAddr = text.parse().ok()?;
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => None,
        _ => Some(ip),
    }
}

fn parse_cidr(text: &str) -> Option<IpNet> {
    let (ip, length) = text.split_once('/')?;
    let is_plain = !length.is_empty()
        && length.bytes().all(|byte| byte.is_ascii_digit())
        && (length == "0" || !length.starts_with('0'));
    let ip = parse_ip(ip).filter(|_| is_plain)?;
    IpNet::new(ip, length.parse().ok()?).ok()
}

fn ip_of(function: &str, value: &Value) -> Result<IpAddr, ExecutionError> {
    let found = match value {
        Value::String(text) => parse_ip(text),
        Value::Opaque(opaque) => opaque.downcast_ref::<Ip>().map(|ip| ip.0),
        _ => None,
    };
    found.ok_or_else(|| ExecutionError::function_error(function, "IP Address parse error during conversion"))
}

fn cidr_of(function: &str, value: &Value) -> Result<IpNet, ExecutionError> {
    let found = match value {
        Value::String(text) => parse_cidr(text),
        Value::Opaque(opaque) => opaque.downcast_ref::<Cidr>().map(|cidr| cidr.0),
        _ => None,
    };
    found.ok_or_else(|| {
        ExecutionError::function_error(function, "network address parse error during conversion from string")
    })
}

fn opaque(value: impl Opaque) -> Value {
    Value::Opaque(Arc::new(value))
}

/// `ip(text)` makes an address, `cidr.ip()` takes that of a prefix.
fn ip(This(this): This<Value>) -> CelResult {
    if let Value::Opaque(value) = &this
        && let Some(cidr) = value.downcast_ref::<Cidr>()
    {
        return Ok(opaque(Ip(cidr.0.addr())));
    }
    ip_of("ip", &this).map(|ip| opaque(Ip(ip)))
}

fn cidr(text: Arc<String>) -> CelResult {
    cidr_of("cidr", &Value::String(text)).map(|cidr| opaque(Cidr(cidr)))
}

fn is_ip(This(this): This<Value>) -> bool {
    matches!(&this, Value::String(text) if parse_ip(text).is_some())
}

fn is_cidr(This(this): This<Value>) -> bool {
    matches!(&this, Value::String(text) if parse_cidr(text).is_some())
}

fn is_canonical(text: Arc<String>) -> CelResult {
    ip_of("ip.isCanonical", &Value::String(text.clone())).map(|ip| Value::Bool(ip.to_string() == *text))
}

fn family(This(this): This<Value>) -> CelResult {
    ip_of("family", &this).map(|ip| Value::Int(if ip.is_ipv4() { 4 } else { 6 }))
}

fn is_unspecified(This(this): This<Value>) -> CelResult {
    ip_of("isUnspecified", &this).map(|ip| Value::Bool(ip.is_unspecified()))
}

fn is_loopback(This(this): This<Value>) -> CelResult {
    ip_of("isLoopback", &this).map(|ip| Value::Bool(ip.is_loopback()))
}

fn is_link_local_unicast(This(this): This<Value>) -> CelResult {
    ip_of("isLinkLocalUnicast", &this).map(|ip| Value::Bool(link_local(ip)))
}

fn link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn is_link_local_multicast(This(this): This<Value>) -> CelResult {
    ip_of("isLinkLocalMulticast", &this).map(|ip| {
        Value::Bool(match ip {
            IpAddr::V4(ip) => ip.octets()[..3] == [224, 0, 0],
            IpAddr::V6(ip) => ip.segments()[0] & 0xff0f == 0xff02,
        })
    })
}

fn is_global_unicast(This(this): This<Value>) -> CelResult {
    ip_of("isGlobalUnicast", &this).map(|ip| {
        let is_broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
        Value::Bool(
            !(is_broadcast || ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || link_local(ip)),
        )
    })
}

fn contains_ip(This(this): This<Value>, other: Value) -> CelResult {
    let (cidr, ip) = (cidr_of("containsIP", &this)?, ip_of("containsIP", &other)?);
    Ok(Value::Bool(cidr.contains(&ip)))
}

fn contains_cidr(This(this): This<Value>, other: Value) -> CelResult {
    let (cidr, other) = (cidr_of("containsCIDR", &this)?, cidr_of("containsCIDR", &other)?);
    Ok(Value::Bool(cidr.trunc().contains(&other.trunc())))
}

fn masked(This(this): This<Value>) -> CelResult {
    cidr_of("masked", &this).map(|cidr| opaque(Cidr(cidr.trunc())))
}

fn prefix_length(This(this): This<Value>) -> CelResult {
    cidr_of("prefixLength", &this).map(|cidr| Value::Int(i64::from(cidr.prefix_len())))
}

fn find(This(this): This<Arc<String>>, pattern: Arc<String>) -> CelResult {
    let regex = regex::Regex::new(&pattern).map_err(|error| ExecutionError::function_error("find", error))?;
    Ok(Value::from(regex.find(&this).map_or("", |found| found.as_str())))
}

fn find_all(This(this): This<Arc<String>>, pattern: Arc<String>) -> CelResult {
    let regex =
        regex::Regex::new(&pattern).map_err(|error| ExecutionError::function_error("findAll", error))?;
    let all: Vec<Value> = regex.find_iter(&this).map(|found| Value::from(found.as_str())).collect();
    Ok(Value::List(Arc::new(all)))
}

fn is_sorted(This(this): This<Arc<Vec<Value>>>) -> bool {
    this.is_sorted_by(|one, next| {
        one.partial_cmp(next).is_some_and(|order| order != std::cmp::Ordering::Greater)
    })
}

/// Declares the functions.
pub fn declare(context: &mut Context<'_, '_>) -> Result<(), DeclarationError> {
    context.add_function("ip", ip)?;
    context.add_function("cidr", cidr)?;
    context.add_function("isIP", is_ip)?;
    context.add_function("isCIDR", is_cidr)?;
    context.add_function("ip.isCanonical", is_canonical)?;
    context.add_function("family", family)?;
    context.add_function("isUnspecified", is_unspecified)?;
    context.add_function("isLoopback", is_loopback)?;
    context.add_function("isLinkLocalUnicast", is_link_local_unicast)?;
    context.add_function("isLinkLocalMulticast", is_link_local_multicast)?;
    context.add_function("isGlobalUnicast", is_global_unicast)?;
    context.add_function("containsIP", contains_ip)?;
    context.add_function("containsCIDR", contains_cidr)?;
    context.add_function("masked", masked)?;
    context.add_function("prefixLength", prefix_length)?;
    context.add_function("find", find)?;
    context.add_function("findAll", find_all)?;
    context.add_function("isSorted", is_sorted)
}
