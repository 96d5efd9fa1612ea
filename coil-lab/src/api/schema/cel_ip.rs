//! IP and CIDR functions for CEL.
